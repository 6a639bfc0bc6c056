"""docs/scaling.md, computed: the 72B reference run beside verl, and seconds a step from 1 to 64 GPUs.

    PYTHONPATH=src python benchmarks/scaling.py [FILE]

Nothing runs on a GPU: all figures are `lorl plan`'s, from rates measured on one H100 and the links' data sheets.
"""

import ast
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from lorl import settings
from lorl.config import RunConfig
from lorl.parallel.auto import engine_on
from lorl.plan import measured
from lorl.plan.choose import Plan, choose, make_plan
from lorl.plan.demand import Demand, demand_of, with_mean_lengths
from lorl.plan.hardware import GIB, GPUS, Cluster, make_cluster
from lorl.plan.host import MODEL_FILES
from lorl.plan.layout import Layout
from lorl.verl.translate import translate

REFERENCE = [  # verl's run for 72B on 8 x 80 GB; its last two lines go without saying there
    "data.train_batch_size=64",
    "actor_rollout_ref.model.use_shm=True",
    "actor_rollout_ref.model.lora_rank=32",
    "actor_rollout_ref.model.lora_alpha=32",
    "actor_rollout_ref.model.target_modules=all-linear",
    "actor_rollout_ref.actor.optim.lr=3e-5",
    "actor_rollout_ref.actor.fsdp_config.fsdp_size=8",
    "actor_rollout_ref.actor.fsdp_config.param_offload=True",
    "actor_rollout_ref.actor.fsdp_config.optimizer_offload=True",
    "actor_rollout_ref.rollout.tensor_model_parallel_size=8",
    "actor_rollout_ref.rollout.name=vllm",
    "actor_rollout_ref.rollout.gpu_memory_utilization=0.4",
    "actor_rollout_ref.rollout.n=5",
    "actor_rollout_ref.rollout.max_num_seqs=64",
    "actor_rollout_ref.rollout.max_model_len=1536",
    "actor_rollout_ref.rollout.max_num_batched_tokens=1536",
    "actor_rollout_ref.rollout.load_format=safetensors",
    "actor_rollout_ref.rollout.layered_summon=True",
    "actor_rollout_ref.ref.fsdp_config.param_offload=True",
    "actor_rollout_ref.actor.ulysses_sequence_parallel_size=1",
    "algorithm.adv_estimator=grpo",
    "actor_rollout_ref.model.path=qwen2.5-72b",
]

MODELS = ("qwen2.5-7b", "qwen2.5-32b", "qwen2.5-72b")
GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64)
GPUS_A_NODE = 8
PROMPTS, SAMPLES, PROMPT_TOKENS, RESPONSE_TOKENS, LONGEST = 128, 8, 256, 512, 1024


def reference() -> tuple[RunConfig, Demand, Cluster]:
    config = translate([*REFERENCE, "+lorl.rollout.engine=auto"]).config  # whether vLLM is installed here or not
    return config, demand_of(config)[0], make_cluster(8, 1, "h100", "80GB")


def markdown() -> str:
    parts = [
        "# Scaling, on paper",
        _prose(
            """Computed, not measured: `python benchmarks/scaling.py docs/scaling.md` writes this page from the formulas
            of `lorl plan`. What they were held against is at the end."""
        ),
        *_reference_run(),
        *_scaling(),
        *_rates(),
    ]
    return "\n\n".join(parts) + "\n"


def _reference_run() -> Iterator[str]:
    config, demand, cluster = reference()
    layouts = [
        Layout("shared", 8, 8),
        Layout("shared", 4, 4),
        Layout("fsdp2", 8, 8),
        Layout("fsdp2", 8, 8, offload=True),
        Layout("ddp"),
    ]
    plans = [make_plan(demand, layout, cluster) for layout in layouts]
    chosen = choose(demand, cluster, engine_on=engine_on(config))
    assert chosen is not None
    yield "## Qwen2.5-72B on 8 x 80 GB"
    yield _prose(
        f"""verl's reference run ({demand.prompts} prompts x {demand.samples}, rank {demand.lora.rank}, 0.4 of the
        memory for the KV cache), read by `lorl.verl` and planned on 8 H100 of 80 GB ({cluster.gpu.memory / GIB:.1f}
        GiB), in GiB a GPU while sampling / while training. verl samples it with tensor parallelism over 8, as the
        first column does; parallel.strategy=auto takes {chosen.layout.name}, with
        rollout.engine={chosen.demand.engine}. The same command line trains on 8 CPU processes with the model cut to 4
        narrow layers: `python benchmarks/reference_run.py`. It asks for optimizer_offload and use_shm: AdamW's moments
        and the model's files are in host memory, and no moments are on a GPU while a pass goes on."""
    )
    extra = [] if chosen.layout in layouts else [chosen]
    yield _reference_table([*plans, *extra])
    yield _prose(
        """"shared" is the trainer on the engine's tensor-parallel shards; fsdp (FSDP1) takes what fsdp2 takes;
        offloaded, it pins a gradient as large as its parts beside them, which is never used.
        Activations are those of recomputed layers: kept, they would take """
        f"{plans[0].memory.without_recompute / GIB:.0f} GiB. Beside verl, by what its code does with these keys:"
    )
    yield _beside_verl(demand, plans[0])
    moved = _verl_moves(demand, cluster) / (measured.LINK_SHARE * cluster.gpu.pcie)
    yield _prose(
        f"""Moving the base over PCIe alone takes verl {moved:.0f} s a step at {measured.LINK_SHARE:.0%} of
        {cluster.gpu.pcie / 1e9:.0f} GB/s. It also recomputes the old log-probabilities of an exactly on-policy
        batch. Both gather the same layers in bfloat16 for each micro-batch."""
    )


def _reference_table(plans: list[Plan]) -> str:
    rows = [[row.holder, *(_both(plan, index) for plan in plans)] for index, row in enumerate(plans[0].memory.rows)]
    totals = [f"**{plan.memory.sampling / GIB:.1f} / {plan.memory.training / GIB:.1f}**" for plan in plans]
    return _table(
        ["", *(plan.layout.name for plan in plans)],
        [
            *(row for row in rows if set(row[1:]) != {"0.0"}),
            ["**all**", *totals],
            ["fits", *("yes" if plan.fits else "no" for plan in plans)],
            ["host memory, GiB a node", *(f"{sum(n for _, n in plan.memory.host) / GIB:.0f}" for plan in plans)],
            *([name, *(_phase(plan, name) for plan in plans)] for name in ("rollout", "update")),
            ["step, s", *(f"{plan.seconds:.0f}" if plan.fits else "" for plan in plans)],
        ],
    )


def _phase(plan: Plan, name: str) -> str:
    found = next(phase for phase in plan.phases if phase.phase == name)
    return f"{found.seconds:.0f} s, mostly {found.bound}" if plan.fits else ""


def _verl_moves(demand: Demand, cluster: Cluster) -> float:
    """Bytes over one GPU's PCIe in a step of verl with parameter offload: float32 shards, 4 times there and back."""
    return 8 * 4 * demand.shape.parameters / cluster.world


def _beside_verl(demand: Demand, plan: Plan) -> str:
    """verl's bytes with P parameters, N GPUs and TP = N."""
    whole, held, ranks = demand.shape.parameters, plan.memory, plan.cluster.world
    cache = 0.4 * plan.cluster.gpu.memory - 2 * whole / ranks
    moved = _verl_moves(demand, plan.cluster)
    rows: list[tuple[str, float, float, str]] = [
        ("trainer's base, a GPU", held.row("base").training, 4 * whole / ranks, "4P/N: float32 shards, its default"),
        ("engine's base, a GPU", 0, 2 * whole / ranks, "2P/TP"),
        ("KV cache, a GPU", held.row("KV cache").sampling, cache, "0.4 of the GPU less the engine's base"),
        ("base in host memory, a node", 0, 6 * whole, "4P offloaded, 2P pinned while the engine sleeps"),
        ("model's files in /dev/shm, a node", dict(held.host)[MODEL_FILES], 2 * whole, "2P: use_shm"),
        ("base over PCIe, a GPU and step", 0, moved, "4P/N to the GPU and back, 4 times"),
        ("a checkpoint", demand.lora.parameters * 12, 4 * whole, "4P: all shards, base included"),
    ]
    return _table(
        ["GiB", "lorl", "verl", "verl's formula"],
        [[name, f"{ours / GIB:.1f}", f"{theirs / GIB:.1f}", formula] for name, ours, theirs, formula in rows],
    )


def _scaling() -> Iterator[str]:
    gpu = GPUS["h100"]
    yield "## From 1 to 64 GPUs"
    yield _prose(
        f"""One step of {PROMPTS} prompts x {SAMPLES} samples, {PROMPT_TOKENS} + {RESPONSE_TOKENS} tokens on average and
        {LONGEST} in the longest answer: the same work whatever the number of GPUs. GRPO, exactly on-policy, rank
        32, micro-batches of 8,192 tokens. H100 of {gpu.memory / GIB:.1f} GiB, {GPUS_A_NODE} to a node; each way
        NVLink has {gpu.nvlink / 1e9:.0f} GB/s, PCIe {gpu.pcie / 1e9:.0f} GB/s and the network
        {gpu.network * 8 / 1e9:.0f} Gb/s a GPU. Efficiency is work a GPU and second, beside the smallest number of
        GPUs that the model fits."""
    )
    for model in MODELS:
        yield f"### {model}"
        yield _table(
            ["GPUs", "layout", "GiB a GPU", "rollout, s", "mostly", "update, s", "mostly", "step, s", "efficiency"],
            list(_scaling_rows(model)),
        )
    yield _prose(
        """"Mostly" is the largest single cause: "products" are matrix products, "memory" the reading of weights and
        keys, "kernels" the small ones of a decoding step, "host" what vLLM's loop costs in it, "Python" the launching
        of a pass's kernels, "links" what moves between GPUs. Adapters have the only gradients, so that their all-reduce
        and the publish,
        which are in the step's seconds, never dominate, not even across nodes. The update scales; a rollout is
        never shorter than its longest answer, which is why a step stops getting faster long before a link is busy:
        more GPUs want more samples a step. Efficiencies above 100% are those of a model that leaves a single GPU
        hardly any room for keys."""
    )


def _scaling_rows(model: str) -> Iterator[list[str]]:
    first: float | None = None  # GPU-seconds
    for count in GPU_COUNTS:
        plan = choose(scaling_demand(model), scaling_cluster(count))
        if plan is None or not plan.fits:
            yield [str(count), "does not fit", *[""] * 7]
            continue
        first = first or count * plan.seconds
        phases = {phase.phase: phase for phase in plan.phases}
        spent = [text for name in ("rollout", "update") for text in (f"{phases[name].seconds:.1f}", phases[name].bound)]
        efficiency = f"{first / (count * plan.seconds):.0%}"
        peak = f"{plan.memory.peak / GIB:.0f}"
        yield [str(count), plan.layout.name, peak, *spent, f"{plan.seconds:.1f}", efficiency]


def scaling_demand(model: str) -> Demand:
    words = [
        f"model.path={model}",
        f"data.prompts_per_step={PROMPTS}",
        f"rollout.n={SAMPLES}",
        f"data.max_prompt_tokens={2 * PROMPT_TOKENS}",
        f"rollout.max_response_tokens={LONGEST}",
    ]
    return with_mean_lengths(demand_of(settings.load(None, words))[0], PROMPT_TOKENS, RESPONSE_TOKENS)


def scaling_cluster(count: int) -> Cluster:
    nodes = max(1, count // GPUS_A_NODE)
    return Cluster(GPUS["h100"], count // nodes, nodes)


def _rates() -> Iterator[str]:
    yield "## What the figures rest on"
    yield _prose(
        """Bytes: `tests/plan` holds the formulas to what autograd saves and torch allocates on the CPU (Llama, Qwen2,
        Qwen3 and Gemma 3 layers, several ranks and targets, layers kept and computed again) and to what runs were
        seen to take on one H100 at 1.5B, 7B and 32B and over four H200s at 32B, each within 10%; and what is offloaded
        to what the offloading code holds on the CPU. On a GPU's host it is pinned, which torch's allocator does in
        powers of two. More than four GPUs, more than one node and 72B were never run. Seconds, from the same runs with
        rank 32 where it does not say "assumed":"""
    )
    yield "\n".join(_sources())
    yield _prose(
        """Not in the seconds: rewards, evaluation, checkpoints, start-up, compilation, and the KV cache's memory given
        back and taken again."""
    )


def _sources() -> Iterator[str]:
    """The constants of `lorl.plan.measured` with the strings below them, which say where each comes from."""
    statements = ast.parse(Path(measured.__file__).read_text(encoding="utf-8")).body
    for constant, said in zip(statements[1::2], statements[2::2], strict=True):
        assert isinstance(constant, ast.Assign)
        assert isinstance(said, ast.Expr)
        yield textwrap.fill(
            f"- `{ast.unparse(constant)}`: {' '.join(ast.literal_eval(said.value).split())}",
            120,
            subsequent_indent="  ",
            break_on_hyphens=False,
        )


def _prose(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_on_hyphens=False)


def _table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown, with numbers to the right."""
    marks = ["---:" if _is_number(cells) else "---" for cells in zip(*rows, strict=True)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, marks, *rows])


def _is_number(cells: tuple[str, ...]) -> bool:
    """Whether a column's last cell that says anything is a number."""
    return bool(re.fullmatch(r"[\d.,/%* ]+", next(cell for cell in reversed(cells) if cell)))


def _both(plan: Plan, index: int) -> str:
    row = plan.memory.rows[index]
    sampling, training = f"{row.sampling / GIB:.1f}", f"{row.training / GIB:.1f}"
    return sampling if sampling == training else f"{sampling} / {training}"


if __name__ == "__main__":
    if sys.argv[1:]:
        Path(sys.argv[1]).write_text(markdown(), encoding="utf-8")
    else:
        sys.stdout.write(markdown())
