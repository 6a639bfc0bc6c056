"""Checksums of tensors: where they lie on a GPU, what is summed stays there and is waited for once.

They find mistakes, not malice. Another version of torch may give others.
"""

import hashlib
from collections.abc import Mapping
from functools import cache

import torch
import xxhash
from torch import Tensor

_CHUNK = 2**21  # 4-byte words summed at once: a chunk, its multipliers and its products fit an H100's L2 cache together


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """XXH3-128, hexadecimal, over names, shapes, dtypes and contents. On the CPU the contents are the bytes themselves,
    read at memory's speed; elsewhere `tensor_checksum`."""
    digest = xxhash.xxh3_128()
    ordered = [(name, tensors[name].detach()) for name in sorted(tensors)]
    if all(tensor.device.type == "cpu" for _, tensor in ordered):
        for name, tensor in ordered:
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()
    sums = torch.stack([tensor_checksum(tensor) for _, tensor in ordered]).tolist()
    for (name, tensor), total in zip(ordered, sums, strict=True):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {total}\n".encode())
    return digest.hexdigest()


def fingerprint(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """Tells bases apart without reading them whole: names, shapes and the ends of every tensor (as if of `dtype`)."""
    return fingerprint_of({name: (tuple(tensor.shape), ends(tensor, dtype)) for name, tensor in tensors.items()})


def fingerprint_of(read: Mapping[str, tuple[tuple[int, ...], Tensor]]) -> str:
    """`fingerprint` of tensors that are not there at the same time: by name, the shape and the `ends` of each."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(read):
        shape, found = read[name]
        digest.update(f"{name}{shape}".encode())
        digest.update(found.numpy().tobytes())
    return digest.hexdigest()


def ends(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """float32[32] (fewer of a small tensor) on the CPU: the first 16 entries and the last, as if of `dtype`."""
    flat = tensor.detach().reshape(-1)
    return torch.cat([flat[:16], flat[-16:]]).to(dtype or flat.dtype).float().cpu()


def tensor_checksum(tensor: Tensor) -> Tensor:
    """int64[] on the tensor's device, not waited for: its bytes as 32-bit words, each times a random odd multiplier,
    summed modulo 2^64, a chunk at a time; the chunks' sums likewise.

    Any one changed word changes it; several do, or another order, but for one chance in 2^32. (Words of 64 bits would
    be half the work, but two flipped top bits would cancel whatever the multipliers.)
    """
    multipliers = _multipliers(tensor.device)
    pieces = tensor.detach().reshape(-1).split(4 * _CHUNK // tensor.dtype.itemsize)
    sums = torch.stack([(words * multipliers[: len(words)]).sum() for words in map(_words, pieces)])
    return (sums * multipliers[: len(sums)]).sum()


def _words(piece: Tensor) -> Tensor:
    """The bytes of a flat tensor as int32, filled up with zeros; a copy only where it does not lie on whole words."""
    missing = -piece.nbytes % 4 // piece.itemsize
    if missing or piece.storage_offset() * piece.itemsize % 4:
        piece = torch.cat([piece, piece.new_zeros(missing)])
    return piece.view(torch.int32)


@cache
def _multipliers(device: torch.device) -> Tensor:
    """int64[_CHUNK], odd, the same wherever and whenever they are drawn."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(-(2**63), 2**63 - 1, (_CHUNK,), generator=generator, dtype=torch.int64)
    return (drawn | 1).to(device)
