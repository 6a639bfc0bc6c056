"""Tokens a second of sampling on the CPU with an adapter on: transformers' two ways, and lorl's engine.

    python benchmarks/rollout_cpu.py --model FOLDER [--engine generate continuous lorl] [--repeats 3]

16 prompts x 8 samples, prompts of about 100 tokens, 16 new tokens each, temperature 1, a rank-32 peft adapter whose
product is not zero. Each engine runs in a fresh process. README.md holds the contract for adding an engine.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig

from _step_case import ALPHA, RANK, make_prompts

PROMPTS = 16
SAMPLES = 8
PROMPT_TOKENS = 100
NEW_TOKENS = 16
# Pages small enough that a prompt's samples share most of its pages; room for every sample to have its own copy.
PAGE_TOKENS = 16
PAGES = PROMPTS * SAMPLES * -(-(PROMPT_TOKENS + NEW_TOKENS) // PAGE_TOKENS)

Completions = list[list[int]]  # [PROMPTS * SAMPLES][NEW_TOKENS]


def adapted_model(path: Path):
    """The base in fp32 under a peft adapter with random A and B: a product of zero could go unnoticed."""
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa")
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    model = get_peft_model(base, lora).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    return model


def generate_engine(path: Path, prompts: list[list[int]]) -> Callable[[], Completions]:
    """`model.generate` on the whole batch; every sample carries its own copy of the prompt."""
    model = adapted_model(path)
    batch = torch.tensor(prompts)
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        num_return_sequences=SAMPLES,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )

    def run() -> Completions:
        with torch.inference_mode():
            rows = model.generate(input_ids=batch, attention_mask=torch.ones_like(batch), generation_config=settings)
        return rows[:, PROMPT_TOKENS:].tolist()

    return run


def continuous_engine(path: Path, prompts: list[list[int]]) -> Callable[[], Completions]:
    """`model.generate_batch`: continuous batching over a paged cache, samples forked from their prompt."""
    model = adapted_model(path)
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        num_return_sequences=SAMPLES,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=-1,  # none: every completion runs to its full length
        pad_token_id=model.config.pad_token_id,
    )
    # Unset, both sizes are worked out as for a GPU: the cache is sized to 90% of the machine's free memory.
    batching = ContinuousBatchingConfig(
        page_size=PAGE_TOKENS, num_blocks=PAGES, max_batch_tokens=PROMPTS * PROMPT_TOKENS
    )

    def run() -> Completions:
        outputs = model.generate_batch(
            prompts, generation_config=settings, continuous_batching_config=batching, warmup=False
        )
        return [output.generated_tokens for output in outputs.values()]

    return run


def lorl_engine(path: Path, prompts: list[list[int]]) -> Callable[[], Completions]:
    """lorl's embedded engine: prompts and whatever samples agree on are computed once."""
    from lorl.config import AdapterConfig, ModelConfig
    from lorl.experience import Prompt
    from lorl.policy.load import TRAINED, load_policy
    from lorl.rollout.engine import Request, Sampling
    from lorl.rollout.torch_engine import TorchEngine

    policy = load_policy(ModelConfig(path=str(path)), AdapterConfig(rank=RANK, alpha=ALPHA), seed=0)
    for name, parameter in policy.parameters(TRAINED).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    engine = TorchEngine(policy)
    engine.publish(TRAINED, 1, policy.checksum(TRAINED))
    requests = [
        Request(Prompt(str(i), ids, ""), [i * SAMPLES + sample for sample in range(SAMPLES)])
        for i, ids in enumerate(prompts)
    ]
    sampling = Sampling(max_tokens=NEW_TOKENS, ignore_eos=True)

    def run() -> Completions:
        return [completion.tokens for completion in engine.generate(requests, sampling, adapter=TRAINED)]

    return run


ENGINES = {"generate": generate_engine, "continuous": continuous_engine, "lorl": lorl_engine}


def time_engine(name: str, path: Path, repeats: int) -> None:
    """Prints one JSON line: seconds of each run after a warm-up run, and the process's peak memory."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts = [prompt.ids for prompt in make_prompts(tokenizer, PROMPT_TOKENS, PROMPTS)]
    run = ENGINES[name](path, prompts)
    seconds = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        completions = run()
        seconds.append(time.perf_counter() - start)
        lengths = [len(tokens) for tokens in completions]
        if lengths != [NEW_TOKENS] * (PROMPTS * SAMPLES):
            sys.exit(f"{name}: {len(lengths)} completions of {sorted(set(lengths))} tokens")
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
    print(json.dumps({"seconds": seconds[1:], "peak_gib": peak_gib}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path.home() / ".cache/lorl/models/smollm2-135m")
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if not (chosen.model / "config.json").is_file():
        parser.error(f"no model in {chosen.model}: fetch SmolLM2-135M-Instruct or name its folder with --model")
    if chosen.in_process:
        time_engine(chosen.engine[0], chosen.model, chosen.repeats)
        return
    print(f"{'engine':<12}{'tokens/s':>9}{'s/run':>8}{'peak GiB':>10}")
    for name in chosen.engine:
        options = ["--model", str(chosen.model), "--engine", name, "--repeats", str(chosen.repeats), "--in-process"]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(chosen.threads)}
        done = subprocess.run([sys.executable, __file__, *options], env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{name} ended with {done.returncode}:\n{done.stderr[-4000:]}")
        result = json.loads(done.stdout.splitlines()[-1])
        median = statistics.median(result["seconds"])
        speed = PROMPTS * SAMPLES * NEW_TOKENS / median
        print(f"{name:<12}{speed:>9.0f}{median:>8.2f}{result['peak_gib']:>10.2f}", flush=True)


if __name__ == "__main__":
    main()
