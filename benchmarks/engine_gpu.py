"""The vLLM engine on the trainer's weights, measured on one GPU.

    python benchmarks/engine_gpu.py engine --shape 1.5b     publish, agreement, fold, throughput beside bare vLLM
    python benchmarks/engine_gpu.py train --shape 32b       publishing, three GRPO steps, memory and seconds by phase

Random weights of true size, drawn in place (std 0.02, norms 1): nothing is downloaded. Short tables last.
"""

import argparse
import json
import pydoc
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import rich
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config

from _planned import InUse, plan_of
from lorl import settings
from lorl.config import RunConfig
from lorl.experience import Outcome, Prompt
from lorl.packing import pack
from lorl.plan.render import as_text
from lorl.policy.fold import fold
from lorl.policy.load import TRAINED, load_policy, load_tokenizer
from lorl.policy.policy import Policy
from lorl.rollout.engine import Request, Sampling
from lorl.rollout.vllm import shared
from lorl.rollout.vllm.engine import VllmEngine
from lorl.worker import Worker

SHAPES: dict[str, dict[str, Any]] = {  # Qwen2.5's
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 1024, "tie_word_embeddings": True},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    "32b": {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "num_attention_heads": 40,
            "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False},
}  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyz "  # a token each
PARTS = ["throughput", "agreement", "folds"]
GIB = 2**30


def sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def free_and_total() -> tuple[int, int]:
    memory = psutil.virtual_memory()
    return torch.cuda.mem_get_info() if torch.cuda.is_available() else (memory.available, memory.total)


def model_folder(shape: str, folder: Path) -> Path:
    """config.json of the shape and a tokenizer of bytes: the ids that it lacks decode to nothing."""
    Qwen2Config(
        **SHAPES[shape], max_position_embeddings=32768, rope_theta=1e6, bos_token_id=None, eos_token_id=1,
        pad_token_id=1, dtype="bfloat16", architectures=["Qwen2ForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|im_start|>": 0, "<|im_end|>": 1} | {char: i + 2 for i, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(folder)
    return folder


def model_keys(args: argparse.Namespace, folder: Path) -> list[str]:
    """The model of --model, or random weights of --shape."""
    if args.model:
        return [f"model.path='{args.model}'"]
    # Many layers of random weights amplify what bfloat16 rounds: 0.11 nats at the 32B shape, before any step.
    bound = "rollout.max_mismatch=1"
    return [f"model.path='{model_folder(args.shape, folder / 'model')}'", "model.random_weights=true", bound]


@torch.no_grad()
def perturb(policy: Policy, seed: int, std: float = 0.01) -> None:
    generator = torch.Generator(policy.device).manual_seed(seed)
    for name, parameter in policy.parameters(TRAINED).items():
        if "lora_B" in name:
            parameter.normal_(0, std, generator=generator)


@torch.no_grad()
def rejuvenate(policy: Policy, size: float = 5e-4) -> None:
    """As after one step of AdamW at that rate: what the adapter adds is about half a step of bfloat16."""
    generator = torch.Generator(policy.device).manual_seed(0)
    for name, parameter in policy.parameters(TRAINED).items():
        if "lora_B" in name:
            parameter.normal_(generator=generator).sign_().mul_(size)


def prompts(count: int, length: int, vocabulary: int, seed: int) -> list[Prompt]:
    draw = random.Random(seed)
    return [Prompt(f"p{i}", [draw.randrange(2, vocabulary) for _ in range(length)], "") for i in range(count)]


def texts(policy: Policy, count: int, length: int) -> list[Prompt]:
    """The documentation of Python's own modules, cut into prompts."""
    tokenizer: Any = policy.tokenizer
    modules = (argparse, json, random, tempfile, time, sys, torch, torch.nn.functional)
    tokens = tokenizer.encode("\n".join(pydoc.plain(pydoc.render_doc(module))[:20000] for module in modules))
    return [Prompt(f"p{i}", tokens[i * length : (i + 1) * length], "") for i in range(count)]


def float32_twin(policy: Policy, config: RunConfig) -> Policy:
    """The same weights without bfloat16's rounding of what is computed."""
    twin = load_policy(
        config.model.model_copy(update={"dtype": "float32"}), config.adapter, seed=0, tokenizer=policy.tokenizer
    )
    theirs = policy.base_tensors()
    with torch.no_grad():
        for name, tensor in twin.base_tensors().items():
            tensor.copy_(theirs[name])
    return twin


def difference(
    engine: VllmEngine, policy: Policy, twin: Policy, adapter: str | None, seed: int, *, folds: bool = False
) -> str:
    """Mean and largest |log-probability difference| over 32 x 2 samples of 64 tokens; and both sides beside float32."""
    engine.folds = folds
    asked = texts(policy, 32, 64)
    requests = [Request(p, [seed * 100 + i, seed * 100 + 50 + i]) for i, p in enumerate(asked)]
    answers = list(engine.generate(requests, Sampling(max_tokens=64, ignore_eos=True), adapter=adapter))
    order = {p.id: i for i, p in enumerate(asked)}
    answers.sort(key=lambda a: (order[a.prompt.id], a.sample))
    experience = pack(answers, [Outcome("ok", 0.0)] * len(answers))
    forest = experience.forest.to(policy.device)
    if adapter is not None:
        twin.load_adapter(adapter, policy.adapter_tensors(adapter), "the policy")
    with torch.no_grad():
        ours, exact = (model.logprobs(forest, adapter=adapter).logprobs.cpu() for model in (policy, twin))
    engine.folds = False
    theirs = experience.rollout_logprobs
    gap = (ours - theirs).abs()
    beside = ", ".join(
        f"{name} {(side - exact).abs().mean():.4f}" for name, side in (("engine", theirs), ("trainer", ours))
    )
    return f"{gap.mean():.4f} (max {gap.max():.2f}; {-theirs.mean():.1f} nats a token; beside float32: {beside})"


@contextmanager
def asking_vllm(engine: VllmEngine) -> Iterator[None]:
    """Inside, vLLM's scheduler asks its block manager in every step, as it does by itself."""
    blocks = vars(engine.inside.blocks)
    ours = {name: blocks.pop(name) for name in ("allocate_slots", "cache_blocks") if name in blocks}
    try:
        yield
    finally:
        blocks.update(ours)


def bare(engine: VllmEngine, asked: list[Prompt], tokens: int, logprobs: int | None, adapter: bool) -> float:
    """Seconds that vLLM itself takes for one sample a prompt, by its own sampler."""
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]
    from vllm.sampling_params import RequestOutputKind  # pyright: ignore[reportMissingImports]

    own = engine.inside.engine
    params = SamplingParams(
        temperature=1.0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=logprobs,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip
    published = engine._published[TRAINED]
    lora = LoRARequest(f"bare{published.adapter_id}", published.adapter_id, "/bare") if adapter else None
    sync()
    started = time.perf_counter()
    for index, prompt in enumerate(asked):
        own.add_request(
            f"bare{time.perf_counter_ns()}-{index}", {"prompt_token_ids": prompt.tokens}, params, lora_request=lora
        )
    with asking_vllm(engine):
        while own.has_unfinished_requests():
            own.step()
        sync()
    return time.perf_counter() - started


def ours(engine: VllmEngine, asked: list[Prompt], tokens: int, adapter: str | None) -> float:
    sync()
    started = time.perf_counter()
    requests = [Request(p, [index]) for index, p in enumerate(asked)]
    made = sum(
        len(c.tokens) for c in engine.generate(requests, Sampling(max_tokens=tokens, ignore_eos=True), adapter=adapter)
    )
    sync()
    assert made == tokens * len(asked)
    return time.perf_counter() - started


def throughput(engine: VllmEngine, policy: Policy, batch: int, length: int, tokens: int) -> list[tuple[str, str]]:
    """Sides alternate; every run has prompts of its own, so that no prefix is cached."""
    vocabulary, seed = policy.config.vocab_size, 1000

    def fresh() -> list[Prompt]:
        nonlocal seed
        seed += 1
        return prompts(batch, length, vocabulary, seed)

    engine.folds = False
    ours(engine, fresh(), 8, TRAINED), bare(engine, fresh(), 8, None, True)
    sides: dict[str, list[float]] = {"bare": [], "lorl": [], "fold": []}
    for _ in range(3):
        sides["bare"].append(bare(engine, fresh(), tokens, None, True))
        sides["lorl"].append(ours(engine, fresh(), tokens, TRAINED))
        engine.folds = True
        sides["fold"].append(ours(engine, fresh(), tokens, TRAINED))
        engine.folds = False
    with_logprobs = bare(engine, fresh(), tokens, 0, True)
    without_adapter = bare(engine, fresh(), tokens, None, False)
    total = batch * tokens
    best = {name: total / min(seconds) for name, seconds in sides.items()}
    return [
        ("tokens/s bare vLLM, adapter, no log-probabilities", f"{best['bare']:.0f}  {sides['bare']}"),
        (
            "tokens/s lorl, adapter, with log-probabilities",
            f"{best['lorl']:.0f} = {best['lorl'] / best['bare']:.3f} of it  {sides['lorl']}",
        ),
        (
            "tokens/s lorl, folded, fold and undo included",
            f"{best['fold']:.0f} = {best['fold'] / best['bare']:.3f} of it  {sides['fold']}",
        ),
        ("tokens/s bare vLLM, adapter, its log-probabilities", f"{total / with_logprobs:.0f}"),
        ("tokens/s bare vLLM, no adapter", f"{total / without_adapter:.0f}"),
    ]


def publishing(engine: VllmEngine, policy: Policy, config: RunConfig, folder: Path) -> list[tuple[str, str]]:
    """The last of five publishes by part, and the same adapter through vLLM's loader of files in memory (/dev/shm)."""
    found = []
    for version in range(1, 6):
        perturb(policy, version)
        engine.publish(TRAINED, version, policy.checksum(TRAINED))
        found.append(engine.publish_times)
    best = min(found, key=lambda times: times.gather + times.copy + times.activate)
    parts = {"gather": best.gather, "copy": best.copy, "activate": best.activate}
    split = " + ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in parts.items())
    rows = [
        ("publish, ms", f"{1e3 * sum(parts.values()):.2f} = {split}"),
        ("proof of a publish, ms", f"slots {1e3 * best.slots:.2f}, answers {1e3 * best.answers:.0f}"),
        ("adapter parameters, M", f"{sum(p.numel() for p in policy.parameters(TRAINED).values()) / 1e6:.1f}"),
    ]  # fmt: skip
    from safetensors.torch import save_file
    from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]

    files = folder / "adapter"
    files.mkdir()
    started = time.perf_counter()
    save_file(
        {k: v.to(policy.dtype) for k, v in policy.adapter_tensors(TRAINED).items()}, files / "adapter_model.safetensors"
    )
    (files / "adapter_config.json").write_text(json.dumps(policy.adapter_config(TRAINED)))
    engine.inside.engine.add_lora(LoRARequest("files", 9999, str(files)))
    sync()
    rows.append(("the same through files in memory, ms", f"{1e3 * (time.perf_counter() - started):.0f}"))
    engine.inside.engine.remove_lora(9999)
    return rows


class Table:
    """Rows printed as they are found, since a lease can end at any time, and once more together."""

    def __init__(self, title: str) -> None:
        self._rows: list[tuple[str, str]] = []
        self._title = title

    def add(self, *rows: tuple[str, str]) -> None:
        self._rows += rows
        for name, value in rows:
            print(f"{name:52} {value}", flush=True)

    def show(self) -> None:
        print(f"\n{self._title}, {device_name()}, torch {torch.__version__}")
        for name, value in self._rows:
            print(f"{name:52} {value}")


def engine_part(args: argparse.Namespace, folder: Path) -> None:
    config = settings.load(None, [
        *model_keys(args, folder), "rollout.engine=vllm", "rollout.adapter_mode=adapter",
        f"rollout.enforce_eager={str(args.eager).lower()}", "rollout.adapter_slots=2", "rollout.max_concurrent=256",
        f"data.max_prompt_tokens={args.prompt}", f"rollout.max_response_tokens={args.response}", *args.keys,
    ])  # fmt: skip
    table, notes = Table(args.model or args.shape), list[str]()
    before, started = free_and_total()[0], time.perf_counter()
    policy, engine = shared.policy_and_engine(config, load_tokenizer(config.model), notes.append)
    table.add(("start, s", f"{time.perf_counter() - started:.0f}"), *(("note", note) for note in notes))
    table.add(("device memory taken, GiB", f"{(before - free_and_total()[0]) / GIB:.2f}"))
    table.add(*publishing(engine, policy, config, folder))
    if "throughput" in args.parts:
        table.add(*throughput(engine, policy, args.batch, args.prompt, args.response))
    if "agreement" in args.parts:
        agreement(engine, policy, float32_twin(policy, config), table)
    if "folds" in args.parts:
        table.add(*folding(policy, args.folds))
    table.show()


def agreement(engine: VllmEngine, policy: Policy, twin: Policy, table: Table) -> None:
    table.add(("|dlogp| base", difference(engine, policy, twin, None, 1)))
    table.add(("|dlogp| adapter", difference(engine, policy, twin, TRAINED, 2)))
    table.add(("|dlogp| folded", difference(engine, policy, twin, TRAINED, 3, folds=True)))
    rejuvenate(policy)
    engine.publish(TRAINED, 6, policy.checksum(TRAINED))
    table.add(("|dlogp| young adapter", difference(engine, policy, twin, TRAINED, 5)))
    table.add(("|dlogp| young adapter, folded", difference(engine, policy, twin, TRAINED, 6, folds=True)))
    for version in range(7, 57):
        perturb(policy, version)
        engine.publish(TRAINED, version, policy.checksum(TRAINED))
    table.add(("|dlogp| adapter after 50 publishes", difference(engine, policy, twin, TRAINED, 4)))


def folding(policy: Policy, folds: int) -> list[tuple[str, str]]:
    checksum, seconds = policy.base_checksum(), []
    record, lost = 0, 0.0
    for number in range(folds):
        perturb(policy, 100 + number)
        sync()
        started = time.perf_counter()
        with fold(policy, TRAINED) as folded:
            middle = time.perf_counter()
            record, lost = folded.record_bytes, folded.lost / folded.entries
            undoing = time.perf_counter()
        seconds.append((middle - started, time.perf_counter() - undoing))
    times = ", ".join(f"{1e3 * min(column):.0f}" for column in zip(*seconds, strict=True))
    return [
        (f"base's checksum after {folds} folds", "unchanged" if policy.base_checksum() == checksum else "CHANGED"),
        ("fold, undo, ms", f"{times}; fixed up {100 * lost:.2f}%, record {record / GIB:.2f} GiB"),
    ]


def train_part(args: argparse.Namespace, folder: Path) -> None:
    from lorl.setup import train
    from lorl.tracking.console import Console

    draw = random.Random(0)
    rows = [{"prompt": "".join(draw.choice(LETTERS) for _ in range(args.prompt)), "answer": "a"} for _ in range(64)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rule.py").write_text("import random\ndef compute_score(*a, **k):\n    return random.random()\n")
    groups = args.batch // 8
    config = settings.load(None, [
        *model_keys(args, folder), "rollout.engine=vllm", "rollout.adapter_mode=adapter",
        f"rollout.enforce_eager={str(args.eager).lower()}", f"rollout.max_concurrent={args.batch}",
        f"data.train='{folder / 'train.jsonl'}'", f"data.prompts_per_step={groups}", "rollout.n=8",
        f"data.max_prompt_tokens={args.prompt + 8}", f"rollout.max_response_tokens={args.response}",
        "rollout.ignore_eos=true", f"reward.path='{folder / 'rule.py'}'", f"trainer.total_steps={args.steps}",
        "checkpoint.every_steps=null", f"run.dir='{folder}'", "run.name=run", *args.keys,
    ])  # fmt: skip
    table = Table(args.model or args.shape)

    def start(config: RunConfig, tokenizer: Any, tell: Any) -> Worker:
        policy, engine = shared.policy_and_engine(config, tokenizer, tell)
        table.add(*publishing(engine, policy, config, folder))
        return Worker(config, policy, engine)

    started = time.perf_counter()
    with InUse() as in_use:
        train(config, Console(sys.stdout), start)
    table.show()
    seconds = time.perf_counter() - started
    print(f"\n{args.shape}, {device_name()}, {args.batch} x ({args.prompt} + {args.response}) tokens, {seconds:.0f} s")
    keys = ["time/step_s", "time/rollout_s", "time/update_s", "time/publish_s", "throughput/rollout_tokens_per_s",
            "throughput/train_tokens_per_s", "memory/peak_gib", "rollout/mismatch"]  # fmt: skip
    for line in (folder / "run" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        print("step", row["step"], *(f"{key.split('/')[1]}={row[key]:.4g}" for key in keys if key in row))
    if not torch.cuda.is_available():
        return
    peak, reserved = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
    print(f"torch's peak {peak:.1f} GiB, reserved {reserved:.1f}; at most {in_use.gib:.1f} in use there. The plan:")
    rich.print(as_text(plan_of(folder / "run" / "config.yaml"), None, []))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["engine", "train"])
    parser.add_argument("--shape", choices=list(SHAPES), default="1.5b")
    parser.add_argument("--model", help="a real model's folder instead of random weights of --shape")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--response", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--folds", type=int, default=50)
    parser.add_argument(
        "--parts", nargs="+", default=PARTS, choices=PARTS, help="of `engine`, besides publishing; default: all"
    )
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs: starts sooner")
    parser.add_argument("--keys", nargs="*", default=[], help="more key=value for the run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:  # files in memory
        (engine_part if args.part == "engine" else train_part)(args, Path(folder))


if __name__ == "__main__":
    main()
