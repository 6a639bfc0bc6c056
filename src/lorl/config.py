"""The whole configuration of a run, typed, on one page.

YAML and `key=value` overrides go through `lorl.settings.load`, which turns every mistake into one sentence. Here is
only the schema: names, types, defaults, bounds and what each key means. Units are in the names.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True)


class ModelConfig(Section):
    """The frozen base."""

    path: str = Field(default="smollm2-135m", description="A folder, a hub id, or the name of a fetched model")
    revision: str | None = Field(default=None, description="Commit or tag on the hub; pin it for runs that must repeat")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto: bfloat16 on GPU, float32 on CPU"
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with the model")
    gradient_checkpointing: bool | Literal["auto"] = Field(
        default="auto",
        description="Keep only the layers' inputs for the backward pass and compute the layers again; auto: in passes "
        "that would not fit the GPU's memory otherwise",
    )
    activation_offload: bool = Field(
        default=False, description="What the layers keep for the backward pass waits for it in host memory"
    )
    use_shm: bool = Field(
        default=False, description="Copy the model's files to /dev/shm, once a node, and load them from there"
    )
    random_weights: bool = Field(
        default=False, description="Take only the model's shape from `path`: for measuring speed and memory"
    )


class AdapterConfig(Section):
    """The trained LoRA adapter; peft's terms."""

    rank: PositiveInt = 32
    alpha: PositiveFloat = 32.0
    dropout: Fraction = 0.0
    target_modules: str | list[str] = Field(
        default="all-linear", description="'all-linear', names, or a regular expression"
    )
    exclude_modules: str | list[str] | None = None
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank)")
    dora: bool = Field(default=False, description="Weight-decomposed LoRA")
    path: str | None = Field(
        default=None, description="Start from this peft folder; its rank, alpha and targets then hold"
    )


class DataConfig(Section):
    """Prompts with what their rewards need."""

    train: str | list[str] | None = Field(
        default=None, description="Parquet or JSON-lines files, or 'hf:NAME[:SPLIT]' for a Hugging Face dataset"
    )
    val: str | list[str] | None = None
    prompts_per_step: PositiveInt = 32
    max_prompt_tokens: PositiveInt = 1024
    overlong: Literal["error", "skip", "truncate_left", "truncate_right"] = "error"
    bad_rows: Literal["error", "skip"] = Field(
        default="error", description="skip: leave them out, listed in the run folder"
    )
    shuffle: bool = True
    max_train_prompts: PositiveInt | None = None
    max_val_prompts: PositiveInt | None = None
    prompt_key: str = Field(
        default="prompt", description="Column: chat messages, or text that becomes one user message"
    )
    answer_key: str | None = Field(
        default="answer",
        description="Column of the truth where there is no reward_model.ground_truth; null: the reward needs none",
    )
    source_key: str = Field(default="data_source", description="Column that picks the built-in reward")
    system_prompt: str | None = Field(default=None, description="Put before every prompt that has no system message")
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)


class RolloutConfig(Section):
    """How completions are sampled."""

    engine: Literal["auto", "torch", "vllm"] = Field(
        default="auto",
        description="torch: embedded; vllm: in this process, on the same weights; auto: vllm on a GPU that has it",
    )
    adapter_mode: Literal["auto", "adapter", "fold"] = Field(
        default="auto",
        description="vllm: apply the adapter beside the base, or add it into the base for each rollout and take it out "
        "exactly; auto: time both once, and fold if that is faster and has room",
    )
    adapter_slots: PositiveInt = Field(default=1, description="vllm: adapters that are live at once")
    enforce_eager: bool = Field(default=False, description="vllm: no CUDA graphs: starts sooner, samples slower")
    compile: bool = Field(
        default=False,
        description="vllm: compile the model too, and capture graphs of passes that read prompts: starts minutes later",
    )
    prefix_caching: bool = Field(default=True, description="vllm: keep the KV cache of common beginnings")
    max_batched_tokens: PositiveInt | None = Field(default=None, description="vllm: tokens in one pass; null: 8192")
    rest: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="vllm: give the KV cache's memory back while the policy trains; auto: if that helps",
    )
    n: PositiveInt = Field(default=8, description="Samples a prompt")
    temperature: NonNegativeFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = Field(default=-1, description="-1 or 0: off")
    min_p: Fraction = 0.0
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, description="Strings that end a completion; not part of its text"
    )
    max_response_tokens: PositiveInt = 512
    ignore_eos: bool = Field(default=False, description="Sample on to max_response_tokens: for measuring speed")
    max_concurrent: PositiveInt = Field(default=256, description="Sequences decoded at a time")
    memory_fraction: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="Share of the device's memory that the KV cache may take; null: the least of what max_concurrent "
        "sequences can fill, 0.4, and what fits",
    )
    max_mismatch: PositiveFloat | None = Field(
        default=None,
        description="Largest mean |log-probability difference| between engine and trainer before the run stops; "
        "null: 1e-3 in float32, 0.05 in bfloat16",
    )
    retries: NonNegativeInt = Field(
        default=2, description="Times that a failing engine is rebuilt and asked for the missing samples, in a rollout"
    )


class RewardConfig(Section):
    """Grading. Every reward runs in a process that can be killed."""

    name: str = Field(
        default="auto", description="A built-in grader, or the function's name in `path`; auto: by data_source"
    )
    path: str | None = Field(
        default=None, description="Python file with the reward function (default name: compute_score)"
    )
    kwargs: dict[str, Any] = Field(default_factory=dict, description="Passed to every call")
    batched: bool = Field(
        default=False, description="The function takes the step's samples in one call (lists, verl's names)"
    )
    deadline_s: PositiveFloat = Field(default=5.0, description="Time limit of one call")
    memory_mib: PositiveInt = Field(default=2048, description="Address space that one call may add")
    workers: PositiveInt = 2


class AlgorithmConfig(Section):
    """What turns rewards into a gradient."""

    preset: Literal["none", "dapo"] = Field(
        default="none", description="A paper's recipe as defaults below what the file and the command line say"
    )
    path: str | None = Field(default=None, description="Python file with estimators and losses of your own")
    advantage: str = Field(default="grpo", description="`lorl algorithms` lists all")
    group_of_one: Literal["zero", "reward"] = Field(
        default="zero", description="Advantage of a sample without peers; reward: its own reward, as verl"
    )
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    lam: Fraction = Field(default=1.0, description="gae: lambda")
    whiten_advantages: bool = Field(default=True, description="gae: zero mean, unit variance over the batch")
    reward_weights: dict[str, float] | None = Field(default=None, description="gdpo: weight of each reward component")
    normalize_std: bool = Field(
        default=True, description="grpo: divide by the group's standard deviation; false: Dr. GRPO"
    )
    policy_loss: str = "ppo_clip"
    clip_low: NonNegativeFloat = 0.2
    clip_high: NonNegativeFloat = 0.2
    clip_dual: Annotated[float, Field(gt=1)] | None = Field(
        default=3.0, description="Lower bound on the loss of negative advantages (dual-clip PPO); null: off"
    )
    sapo_tau_positive: PositiveFloat = 1.0
    sapo_tau_negative: PositiveFloat = 1.05
    dppo_max_ratio: PositiveFloat = 20.0
    dro_beta: PositiveFloat = 0.1
    clip_cov_ratio: PositiveFloat = 2e-4
    clip_cov_low: float = 1.0
    clip_cov_high: float = 5.0
    kl_cov_ratio: PositiveFloat = 2e-4
    kl_cov_coef: NonNegativeFloat = 1.0
    aggregation: Literal[
        "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
    ] = "token-mean"
    aggregation_norm: PositiveFloat | None = Field(
        default=None, description="seq-mean-token-sum-norm: the constant divisor; null: rollout.max_response_tokens"
    )
    kl_coef: NonNegativeFloat = 0.0
    kl_in: Literal["loss", "reward"] = "loss"
    kl_estimator: str = "k3"
    kl_control: Literal["fixed", "adaptive"] = Field(
        default="fixed", description="adaptive: steer kl_coef to kl_target"
    )
    kl_target: PositiveFloat = 0.1
    kl_horizon: PositiveInt = Field(default=10_000, description="Samples over which the adaptive coefficient moves")
    reference: Literal["start", "base"] = Field(
        default="start", description="KL anchor: the adapter that training started from, or the base without adapter"
    )
    entropy_coef: float = 0.0
    dynamic_sampling: bool = Field(
        default=False, description="Replace groups without a gradient by fresh prompts until the step is full (DAPO)"
    )
    max_refills: PositiveInt = Field(default=10, description="dynamic_sampling: rounds before the step goes on short")
    overlong_buffer_tokens: NonNegativeInt = Field(
        default=0, description="Punish answers that run into the last so many of max_response_tokens (DAPO); 0: off"
    )
    overlong_penalty: NonNegativeFloat = Field(default=1.0, description="The punishment at the very end")
    epochs: PositiveInt = Field(default=1, description="Passes over each step's batch")
    minibatch_prompts: PositiveInt | None = Field(
        default=None, description="Prompts an optimizer step; null: the whole batch"
    )


class CorrectionConfig(Section):
    """What is done about the difference between the engine that samples and the policy that trains."""

    preset: str = Field(default="disabled", description="A recipe by verl's name; the other keys refine it")
    importance: Literal["token", "sequence"] | None = Field(
        default=None, description="Importance weights; null: preset's"
    )
    upper: PositiveFloat | None = Field(default=None, description="Bound of the weights; null: the preset's")
    lower: PositiveFloat | None = Field(default=None, description="With it, weights outside the bounds become zero")
    normalize: bool = Field(default=False, description="Divide the weights by their mean over the batch")
    reject: list[str] = Field(default_factory=list, description="Tests, such as seq_mean_k1:0.999_1.001; all must pass")
    bypass: bool | None = Field(default=None, description="Take the engine's log-probabilities as the old ones")
    bypass_loss: Literal["ppo_clip", "reinforce"] | None = None


class CriticConfig(Section):
    """PPO's value function: a second adapter with a value head on the same base (advantage=gae)."""

    rank: PositiveInt | None = Field(default=None, description="null: the policy adapter's; likewise below")
    alpha: PositiveFloat | None = None
    target_modules: str | list[str] | None = None
    path: str | None = Field(default=None, description="Start from this critic folder of a checkpoint")
    lr: PositiveFloat = Field(default=1e-4, description="Constant; betas and eps are optim's")
    weight_decay: NonNegativeFloat = 0.0
    warmup_steps: NonNegativeInt = Field(default=0, description="Steps in which only the critic learns")
    epochs: PositiveInt = 1
    value_clip: PositiveFloat | None = Field(default=0.5, description="Largest move of a value in one step; null: off")
    max_grad_norm: PositiveFloat | None = 1.0


class RewardModelConfig(Section):
    """A learned reward beside or instead of the rule."""

    path: str | None = Field(
        default=None, description="An adapter with a score head (`lorl train-reward`), or a sequence classifier"
    )
    weight: float = Field(default=1.0, description="Factor of its score")
    rule_weight: float = Field(default=1.0, description="Factor of the rule's reward; 0: no rule is asked")


class OptimConfig(Section):
    """AdamW over the adapter's float32 masters."""

    lr: PositiveFloat = Field(default=3e-5, description="About ten times what full fine-tuning would use")
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: NonNegativeInt = 0
    min_lr_ratio: Fraction = 0.0
    max_grad_norm: PositiveFloat | None = 1.0


class ParallelConfig(Section):
    """How the work is spread."""

    strategy: Literal["auto", "local", "ddp", "fsdp", "fsdp2", "shared"] = Field(
        default="auto",
        description="local: this process, one device; ddp: the whole base on each GPU; fsdp2 and fsdp: a share of "
        "each layer, by torch's fully_shard or FullyShardedDataParallel, beside a tensor-parallel vLLM's own copy; "
        "shared: the parts that one tensor-parallel vLLM holds; auto: what the plan finds for the memory",
    )
    gpus: PositiveInt = Field(default=1, description="Of each node; without CUDA it counts processes")
    nodes: PositiveInt = 1
    shard_size: PositiveInt | None = Field(
        default=None,
        description="fsdp2, fsdp, shared: ranks that hold one copy of the base among them, and run one vLLM; null: all",
    )
    param_offload: bool = Field(
        default=False,
        description="The base's layers lie in host memory; each is copied to the device as a pass comes to it",
    )
    optimizer_offload: bool = Field(
        default=False, description="The optimizers' state lies in host memory between their steps"
    )
    sequence: PositiveInt = Field(
        default=1,
        description="Ranks that split each pass by tokens among them and attention by heads (Ulysses): a divisor of "
        "the number of ranks and of the model's attention heads. With adapter.dropout other tokens drop out than in "
        "one process",
    )
    microbatch_tokens: PositiveInt = Field(
        default=8192,
        description="Packed tokens that a rank holds in one forward and backward pass: a pass that parallel.sequence "
        "ranks split has as many times more",
    )
    threads: PositiveInt | None = Field(default=None, description="CPU threads of torch; null: all cores")
    collective_limit_s: PositiveFloat = Field(
        default=600.0, description="Time that a rank waits for the others before the run ends and says for whom"
    )


class TrainerConfig(Section):
    """How long, how often, and when to give up."""

    total_steps: PositiveInt | None = Field(default=None, description="Overrides total_epochs")
    total_epochs: PositiveInt = 1
    eval_every: PositiveInt | None = Field(
        default=None, description="Steps between evaluations on data.val; null: ends only"
    )
    eval_before: bool = True
    max_skipped_steps: PositiveInt = Field(
        default=3,
        description="Steps in a row that were not finite before the run gives up (exit 3), and of which no sample "
        "could be graded (exit 2)",
    )
    trackers: list[str] = Field(default_factory=list, description="Besides jsonl: tensorboard, wandb, trackio, mlflow")


class EvalConfig(Section):
    """How data.val is answered during training."""

    n: PositiveInt = Field(default=1, description="Samples a prompt")
    temperature: NonNegativeFloat = Field(default=0.0, description="0: greedy")
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = -1
    success: float = Field(default=1.0, description="A reward of at least this counts as a right answer")


class CheckpointConfig(Section):
    every_steps: PositiveInt | None = Field(default=10, description="null: at the end (and when stopped) only")
    keep: PositiveInt | None = Field(
        default=3, description="Newest checkpoints kept (null: all); the best by validation accuracy is kept besides"
    )
    keep_best: bool = True


class RunSection(Section):
    name: str | None = Field(
        default=None, description="Folder below run.dir; null: made from model, algorithm and time"
    )
    dir: str = "runs"
    restarts: NonNegativeInt = Field(
        default=0,
        description="Times that a run which crashed, was killed or hangs is started again from its last checkpoint; "
        "0: never, the run is this process",
    )
    step_limit_s: PositiveFloat | None = Field(
        default=3600.0,
        description="restarts: a run without a sign of life (a sample, a phase, a step) for so long hangs; choose more "
        "than a step takes. null: never",
    )
    project: str = Field(default="lorl", description="What trackers file the run under")


class RunConfig(Section):
    """A whole run."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    reward: RewardConfig = Field(default_factory=RewardConfig)
    reward_model: RewardModelConfig = Field(default_factory=RewardModelConfig)
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig)
    correction: CorrectionConfig = Field(default_factory=CorrectionConfig)
    critic: CriticConfig = Field(default_factory=CriticConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    run: RunSection = Field(default_factory=RunSection)
    seed: NonNegativeInt = 0
    resume: str = Field(default="auto", description="auto, never, or a checkpoint's folder")

    @model_validator(mode="after")
    def _combinations(self) -> "RunConfig":
        minibatch, batch = self.algorithm.minibatch_prompts, self.data.prompts_per_step
        if minibatch is not None and batch % minibatch:
            raise ValueError(
                f"algorithm.minibatch_prompts={minibatch} does not divide data.prompts_per_step={batch}; "
                f"use a divisor such as {next(d for d in range(minibatch, 0, -1) if batch % d == 0)}"
            )
        if self.rollout.temperature == 0 and self.rollout.n > 1:
            raise ValueError(
                f"rollout.temperature=0 gives rollout.n={self.rollout.n} equal samples and nothing to learn from; "
                "use a temperature such as 1.0"
            )
        if self.algorithm.clip_low >= 1:
            raise ValueError(f"algorithm.clip_low={self.algorithm.clip_low} must be below 1 (the ratio is positive)")
        if self.eval.temperature == 0 and self.eval.n > 1:
            raise ValueError(f"eval.n={self.eval.n} greedy samples are all equal; set eval.temperature above 0")
        return self
