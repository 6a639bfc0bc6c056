"""Folding an adapter into the base and out again: seconds, the record's size, and whether every byte came back.

    python benchmarks/fold.py [--device cuda] [--shape smollm2|1.5b|32b-layer] [--dtype bfloat16] [--folds 50]
    python benchmarks/fold.py --model FOLDER

Random weights of the given shape (`32b-layer`: one layer of Qwen2.5-32B), or a model from disk. The rank-32 adapter on
all linear layers is drawn anew for every fold; its product in each layer is `--relative-norm` of the weight.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lorl.config import AdapterConfig
from lorl.policy import adapters, attention
from lorl.policy.fold import fold
from lorl.policy.policy import Policy

NAME = "policy"
RANK = 32
VOCABULARY = 1024  # embeddings take no part
SHAPES = {
    "smollm2": ("llama", {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}, (9, 3)),
    "1.5b": ("qwen2", {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28}, (12, 2)),
    "32b-layer": ("qwen2", {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 1}, (40, 8)),
}


def load(path: Path | None, shape: str, device: torch.device, dtype: torch.dtype) -> Policy:
    """A policy with a rank-32 adapter on all linear layers. No text passes here: it gets no tokenizer."""
    options: Any = {"dtype": dtype, "attn_implementation": attention.NAME}
    torch.manual_seed(0)
    if path:
        base = AutoModelForCausalLM.from_pretrained(path, **options).to(device)
    else:
        family, sizes, (heads, shared) = SHAPES[shape]
        config = AutoConfig.for_model(
            family, vocab_size=VOCABULARY, num_attention_heads=heads, num_key_value_heads=shared, **sizes
        )
        with device:
            base = AutoModelForCausalLM.from_config(config, **options)
    base.requires_grad_(False)
    peft = adapters.attach(base, NAME, AdapterConfig(rank=RANK, alpha=RANK), seed=0)
    tokenizer: Any = None
    return Policy(peft, tokenizer, trained=NAME)


def draw_adapter(policy: Policy, relative_norm: float) -> None:
    """A new random B, as long as makes the norm of B A `relative_norm` of the weight's."""
    base = policy.peft.get_base_model()
    for layer in (module for module in base.modules() if hasattr(module, "lora_B")):
        up, down = layer.lora_B[NAME].weight.data, layer.lora_A[NAME].weight.data
        up.normal_()
        product = torch.linalg.matrix_norm(up @ down) * layer.scaling[NAME]
        up *= relative_norm * torch.linalg.matrix_norm(layer.base_layer.weight, dtype=torch.float32) / product


def timed(device: torch.device, call: Any) -> tuple[Any, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start  # folding and undoing wait for the device themselves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--shape", choices=SHAPES, help="default: 1.5b on cuda, smollm2 on the CPU")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--model", type=Path, help="a model's folder, instead of random weights")
    parser.add_argument("--folds", type=int, default=50)
    parser.add_argument("--relative-norm", type=float, default=0.01)
    chosen = parser.parse_args()
    device = chosen.device
    shape = chosen.shape or ("1.5b" if device.type == "cuda" else "smollm2")
    policy = load(chosen.model, shape, device, getattr(torch, chosen.dtype))

    checksum, checksum_s = policy.base_checksum(), timed(device, policy.base_checksum)[1]
    fold_s, undo_s, lost, record, peak = [], [], [], [], 0
    for _ in range(chosen.folds):
        draw_adapter(policy, chosen.relative_norm)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            held = torch.cuda.memory_allocated(device)
        folded, seconds = timed(device, lambda: fold(policy, NAME))
        fold_s.append(seconds)
        lost.append(folded.lost / folded.entries)
        record.append(folded.record_bytes)
        undo_s.append(timed(device, folded.undo)[1])
        if device.type == "cuda":
            peak = max(peak, torch.cuda.max_memory_allocated(device) - held)
    folded_bytes = folded.entries * policy.dtype.itemsize
    factor_bytes = sum(parameter.nbytes for parameter in policy.parameters(NAME).values())

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{chosen.model or shape}, {chosen.dtype}, {name}: {folded_bytes / 2**20:.0f} MiB folded into")
    print(f"fold      {statistics.median(fold_s) * 1e3:9.1f} ms   (median of {chosen.folds})")
    print(f"undo      {statistics.median(undo_s) * 1e3:9.1f} ms")
    print(f"checksum  {checksum_s * 1e3:9.1f} ms   (of the whole base)")
    print(f"fixed up  {100 * statistics.mean(lost):9.2f} %    of the entries")
    print(
        f"record    {max(record) / 2**20:9.1f} MiB  = {100 * max(record) / folded_bytes:.1f}% of what is folded into, "
        f"{factor_bytes / 2**20:.1f} MiB of it the adapter's copy"
    )
    if peak:
        print(f"peak      {peak / 2**20:9.1f} MiB  above what was held before, record included")
    same = policy.base_checksum() == checksum
    print(f"base's checksum after {chosen.folds} folds: {'unchanged' if same else 'CHANGED'}")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
