"""GPUs and what joins them, and sizes as people write them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lorl.errors import UserError, nearest

GIB = 2**30
RESERVE = 0.03  # share of a device that CUDA, NCCL, kernels and fragmentation take

_UNITS = {"": 1, "B": 1, **{f"{prefix}B": 1000**i for i, prefix in enumerate("KMGT", 1)}}
_UNITS |= {f"{prefix}IB": 1024**i for i, prefix in enumerate("KMGT", 1)}
_UNITS |= {prefix: 1000**i for i, prefix in enumerate("KMGT", 1)}


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU's data sheet. Bytes, and bytes or operations a second; of links, each way."""

    name: str
    memory: int  # what CUDA reports
    flops: float  # dense bfloat16
    hbm: float
    nvlink: float
    pcie: float
    network: float = 50e9  # 400 Gb/s, one card a GPU


GPUS: dict[str, Gpu] = {
    "h100": Gpu("H100", int(79.1 * GIB), 989e12, 3.35e12, 450e9, 64e9),
    "h200": Gpu("H200", int(139.8 * GIB), 989e12, 4.8e12, 450e9, 64e9),
    "a100": Gpu("A100", int(79.1 * GIB), 312e12, 2.04e12, 300e9, 32e9),
    "b200": Gpu("B200", int(178 * GIB), 2250e12, 8e12, 900e9, 64e9),
}


@dataclass(frozen=True, slots=True)
class Cluster:
    """`nodes` machines of `gpus` equal GPUs each."""

    gpu: Gpu
    gpus: int
    nodes: int = 1

    @property
    def world(self) -> int:
        return self.gpus * self.nodes

    def link(self, ranks: int) -> float:
        """Bytes a second that each of `ranks` neighbouring GPUs receives in a collective among them. Across nodes the
        cards of a node work side by side."""
        return self.gpu.nvlink if ranks <= self.gpus else min(self.gpu.nvlink, self.gpus * self.gpu.network)


def find_gpu(name: str) -> Gpu:
    """Raises UserError for a GPU that is not in GPUS."""
    key = name.lower().replace(" ", "").removeprefix("nvidia")
    if key not in GPUS:
        raise UserError(f"--gpu {name}: lorl does not know its data sheet; {nearest(key, GPUS)}")
    return GPUS[key]


def described_gpu(name: str | None, memory: int) -> Gpu:
    """A GPU by the name that its driver gives it, with the memory that it reports. One without a data sheet here (None:
    a CPU) has the first sheet's rates: layouts are compared, and what tells them apart is mostly memory."""
    words = "" if name is None else name.lower()
    sheet = next((gpu for key, gpu in GPUS.items() if key in words), next(iter(GPUS.values())))
    return replace(sheet, name=name or "CPU", memory=memory)


def make_cluster(
    gpus: int, nodes: int, gpu: str = "H100", memory: str | None = None, bandwidths: Sequence[str] = ()
) -> Cluster:
    """From the command line's words.

    Args:
        gpus: of all nodes together.
        memory: of one GPU, such as 79GiB, or as it is sold (80GB); None: what the driver reports.
        bandwidths: LINK=SIZE a second for any of nvlink, pcie, network and hbm.

    Raises:
        UserError: a count below one or that the nodes don't divide, an unknown GPU, a size that can't be read.
    """
    if gpus < 1 or nodes < 1:
        raise UserError(f"--gpus {gpus}: at least one GPU is needed")
    if gpus % nodes:
        raise UserError(f"--gpus {gpus} does not divide among parallel.nodes={nodes}; use a multiple of {nodes}")
    found = find_gpu(gpu)
    if memory is not None:
        found = replace(found, memory=_usable(parse_size(memory, "--gpu-memory"), memory))
    return Cluster(replace(found, **_links(bandwidths)), gpus // nodes, nodes)


def _usable(size: int, text: str) -> int:
    """A card sold as 80 GB has 80 GiB, of which its driver keeps a hundredth (79.1 GiB were seen on an H100)."""
    return int(size / 10**9 * GIB * 0.9888) if text.strip().upper().endswith("GB") else size


def parse_size(text: str, option: str) -> int:
    """Bytes of `80GB` (10^9 each), `79.1GiB` (2^30) or a plain number. Raises UserError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)(?:/s)?\s*", text)
    unit = found.group(2).upper() if found else None
    if found is None or unit not in _UNITS or float(found.group(1)) == 0:
        raise UserError(f"{option} {text}: expected a size such as 80GB or 79GiB")
    return int(float(found.group(1)) * _UNITS[unit])


def _links(words: Sequence[str]) -> Mapping[str, float]:
    links = ("nvlink", "pcie", "network", "hbm")
    found: dict[str, float] = {}
    for word in words:
        link, equals, size = word.partition("=")
        if not equals or link not in links:
            raise UserError(f"--bandwidth {word}: expected LINK=SIZE, such as nvlink=300GB; {nearest(link, links)}")
        found[link] = float(parse_size(size, f"--bandwidth {link}"))
    return found
