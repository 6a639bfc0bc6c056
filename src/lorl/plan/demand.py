"""What a run asks of its devices: the numbers of its configuration that decide memory and time, and nothing else."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorl.errors import UserError
from lorl.plan.footprint import Pass
from lorl.plan.lora import Lora, critic_lora_of, lora_in, lora_of
from lorl.plan.shape import KNOWN_TYPES, Shape, find_folder, find_shape

if TYPE_CHECKING:
    from lorl.config import ModelConfig, RunConfig

Engine = Literal["torch", "vllm"]
Device = Literal["cuda", "cpu"]

MEAN_LENGTH = 0.5  # of prompts and answers, as a share of the longest allowed; rollout.adapter_mode=auto assumes it too
ENGINE_TOKENS = 8192  # in one pass of vLLM, where rollout.max_batched_tokens does not say


@dataclass(frozen=True, slots=True)
class Demand:
    """One run's work and its memory settings."""

    device: Device
    shape: Shape
    parameters: int  # of the whole base: the shape's, or those that the model has
    lora: Lora  # the policy's
    critic: Lora | None
    frozen: tuple[Lora, ...]  # adapters without an optimizer: a reference, a reward model
    itemsize: int  # bytes of a base weight
    classifier: int  # bytes of a reward model that is a model of its own
    # of a step
    prompts: int
    samples: int  # a prompt
    prompt_tokens: int  # mean
    response_tokens: int  # mean
    longest_prompt: int
    longest_response: int
    minibatches: int  # optimizer steps, over all epochs
    epochs: int
    critic_epochs: int
    scorings: int  # passes without gradient over the step's samples: old and reference log-probabilities, values
    entropy: bool
    # memory settings
    microbatch_tokens: int  # of a rank
    sequence: int  # ranks that split a micro-batch
    recompute: bool | Literal["auto"]
    engine: Engine
    concurrent: int
    engine_tokens: int
    slots: int
    folds: bool  # whether rollouts have to fold the adapter into the base
    memory_fraction: float | None
    rest: Literal["auto", "always", "never"]
    shard_size: int | None  # ranks that hold a copy of a sharded base; None: whatever is best
    # host memory instead of a GPU's
    offload: bool  # the base's layers lie there; False: wherever is best
    optimizer_offload: bool
    activation_offload: bool
    shm_files: int  # bytes that a node's copy of the model's files takes

    @property
    def learning(self) -> tuple[Lora, ...]:
        """The adapters with an optimizer. Their scalar heads are not counted, of one number a hidden unit."""
        return (self.lora,) if self.critic is None else (self.lora, self.critic)

    @property
    def adapters(self) -> tuple[Lora, ...]:
        return self.learning + self.frozen

    @property
    def longest(self) -> int:
        """Tokens of the longest sample with its prompt."""
        return self.longest_prompt + self.longest_response

    @property
    def packed_tokens(self) -> int:
        """Of a step: every prompt once, every answer in full."""
        return self.prompts * (self.prompt_tokens + self.samples * self.response_tokens)

    @property
    def sampled_tokens(self) -> int:
        return self.prompts * self.samples * self.response_tokens

    @property
    def longest_share(self) -> int:
        """Tokens of the longest sample that one rank holds."""
        return -(-self.longest // self.sequence)

    def microbatch(self, ranks: int) -> int:
        """A rank's tokens of the largest micro-batch: it has no more than its share of a step, and samples are only cut
        into the shares of the ranks that split a pass."""
        most = self._part(max(1, ranks // self.sequence))
        return max(self.longest_share, min(self.microbatch_tokens, -(-most // self.sequence)))

    def _part(self, parts: int) -> int:
        """Tokens of the largest of so many parts of a step (`lorl.parallel.split.share`): whole groups, or where there
        are fewer of them samples, each with its prompt once a part."""
        if self.prompts >= parts:
            return -(-self.prompts // parts) * (self.longest_prompt + self.samples * self.longest_response)
        samples = -(-self.prompts * self.samples // parts)
        return min(self.prompts, samples) * self.longest_prompt + samples * self.longest_response

    def passes_as(self, tokens: int, *, recompute: bool) -> Pass:
        """How a pass over `tokens` packed tokens computes."""
        on_cpu = self.device == "cpu"
        tree = self.longest_prompt + self.samples * self.longest_response
        return Pass(
            self.itemsize,
            eager=on_cpu or self.itemsize != 2,
            recompute=recompute,
            entropy=self.entropy,
            away=self.activation_offload,
            span=min(tree, tokens) if on_cpu else 0,
        )


def demand_of(
    config: "RunConfig", shape: Shape | None = None, lora: Lora | None = None, device: Device = "cuda"
) -> tuple[Demand, list[str]]:
    """The demand of a run, and what was assumed on the way, a sentence each. The model's `shape` is looked up by
    `model.path` where it is not given, and the policy's adapter by `adapter`: a run that gives its `lora` checks itself
    what its adapters reach. On a CPU nothing has another memory to go to.

    Raises:
        UserError: the model's shape is unknown, an adapter fits it nowhere or its folder cannot be read, or the
            objective contradicts itself.
    """
    from lorl.objective import Objective

    shape, notes, on_gpu = shape or find_shape(config.model.path), list[str](), device == "cuda"
    if shape.model_type not in KNOWN_TYPES:
        notes.append(f"model_type={shape.model_type} is taken for a llama of its sizes")
    if config.adapter.dora:
        notes.append("DoRA's magnitudes and what they keep are not counted")
    adapter, algorithm, objective = config.adapter, config.algorithm, Objective.of(config)
    has_reference = algorithm.kl_coef > 0
    itemsize = 4 if config.model.dtype in (("float32",) if on_gpu else ("float32", "auto")) else 2
    policy = lora or lora_of(shape, adapter)
    anchored = has_reference and adapter.path is not None and algorithm.reference == "start"
    critic = None
    if objective.needs_critic:
        critic = critic_lora_of(shape, config.critic, adapter, policy, checked=lora is not None)
    reward_adapters, classifier = _reward_model(config, shape, policy, itemsize, notes)
    prompts, samples = config.data.prompts_per_step, config.rollout.n
    mean_response = config.rollout.max_response_tokens * (1 if config.rollout.ignore_eos else MEAN_LENGTH)
    demand = Demand(
        device=device,
        shape=shape,
        parameters=shape.parameters,
        lora=policy,
        critic=critic,
        frozen=(policy,) * anchored + reward_adapters,
        itemsize=itemsize,
        classifier=classifier,
        prompts=prompts,
        samples=samples,
        prompt_tokens=max(1, int(config.data.max_prompt_tokens * MEAN_LENGTH)),
        response_tokens=max(1, int(mean_response)),
        longest_prompt=config.data.max_prompt_tokens,
        longest_response=config.rollout.max_response_tokens,
        minibatches=algorithm.epochs * (prompts // (algorithm.minibatch_prompts or prompts)),
        epochs=algorithm.epochs,
        critic_epochs=config.critic.epochs if objective.needs_critic else 0,
        scorings=objective.needs_old_logprobs + has_reference + objective.needs_critic,
        entropy=algorithm.entropy_coef != 0,
        shm_files=_shm_files(config.model, shape, notes),
        **_memory_settings(config, on_gpu, itemsize),
    )
    lengths = "as long as allowed" if config.rollout.ignore_eos else "half of the longest allowed"
    notes.append(
        f"prompts average {demand.prompt_tokens} tokens, half of the longest allowed; "
        f"answers {demand.response_tokens}, {lengths}"
    )
    if demand.engine == "torch":
        notes.append("the rollout's seconds are vLLM's; the embedded engine, which samples, is not built for GPUs")
    return demand, notes


def _memory_settings(config: "RunConfig", on_gpu: bool, itemsize: int) -> dict[str, Any]:
    """The fields of Demand that decide where things lie and for how long."""
    model, rollout, parallel = config.model, config.rollout, config.parallel
    recompute = model.gradient_checkpointing
    return {
        "microbatch_tokens": parallel.microbatch_tokens,
        "sequence": parallel.sequence,
        "recompute": recompute if on_gpu else recompute is True,
        "engine": _engine(config),
        "concurrent": rollout.max_concurrent,
        "engine_tokens": rollout.max_batched_tokens or max(ENGINE_TOKENS, rollout.max_concurrent),
        "slots": rollout.adapter_slots,
        "folds": rollout.adapter_mode == "fold" or (on_gpu and itemsize == 4),
        "memory_fraction": rollout.memory_fraction,
        "rest": rollout.rest,
        "shard_size": parallel.shard_size,
        "offload": on_gpu and parallel.param_offload,
        "optimizer_offload": on_gpu and parallel.optimizer_offload,
        "activation_offload": on_gpu and model.activation_offload,
    }


def _engine(config: "RunConfig") -> Engine:
    """The one that `auto` takes on GPUs where there is a layout for it."""
    splits = config.rollout.engine == "auto" and config.parallel.sequence > 1
    return "torch" if splits or config.rollout.engine == "torch" else "vllm"


def _reward_model(
    config: "RunConfig", shape: Shape, policy: Lora, itemsize: int, notes: list[str]
) -> tuple[tuple[Lora, ...], int]:
    """An adapter on the run's base, or the bytes of a whole model beside it."""
    path = config.reward_model.path
    if path is None:
        return (), 0
    if (Path(path).expanduser() / "adapter_config.json").is_file():
        return (lora_in(shape, path, "reward_model.path"),), 0
    try:
        return (), find_shape(path).parameters * itemsize
    except UserError:
        notes.append(f"reward_model.path={path}: lorl does not know its shape, and counts an adapter's bytes for it")
        return (policy,), 0


def _shm_files(model: "ModelConfig", shape: Shape, notes: list[str]) -> int:
    """Bytes of the files that `model.use_shm` copies once a node, and a word where they are not at hand."""
    from lorl.policy.shared_memory import wanted_files

    if not model.use_shm or model.random_weights:
        return 0
    folder = find_folder(model.path)
    files = [] if folder is None else wanted_files(folder)
    if any(file.suffix == ".safetensors" for file in files):
        return sum(file.stat().st_size for file in files)
    notes.append("the model's files, which model.use_shm=true copies, have 2 bytes a parameter")
    return 2 * shape.parameters


def with_mean_lengths(demand: Demand, prompt: int, response: int) -> Demand:
    """The same run on data whose lengths are known."""
    return replace(demand, prompt_tokens=prompt, response_tokens=response)
