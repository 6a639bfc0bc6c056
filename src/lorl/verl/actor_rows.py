"""actor_rollout_ref.{model,actor,ref}.*: the policy, its adapter, its loss and its optimizer."""

from typing import Any, Literal

from lorl.verl.rows import (
    Count,
    Fraction,
    Mapping,
    Natural,
    NonNegative,
    Number,
    OrMinusOne,
    Positive,
    Row,
    Texts,
    joins,
    refused,
    sets,
    unused,
)

PACKED = "lorl packs by tokens; parallel.microbatch_tokens bounds one forward and backward pass"
SHARED_BASE = "one frozen base serves actor, reference, critic and, but beside fsdp, the engine; it is never moved"
MEGATRON = "lorl has no Megatron; use verl's FSDP keys, such as actor_rollout_ref.model.lora_rank"
VISION = "lorl trains on text only, not on images or video"
KERNELS = "lorl's own packed attention and chunked log-probabilities are always on"
ALWAYS_SAVED = "a checkpoint holds adapter, optimizer and counters, and never the base"
ONE_SEED = "data.seed (lorl's seed) rules every draw"
PROFILER = "lorl has no profiler hooks"

KL_TYPES = Literal["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "kl+", "k1+", "abs+", "mse+", "k2+",
                   "low_var_kl+", "k3+"]  # fmt: skip
LOSS_MODES = Literal["vanilla", "gspo", "sapo", "gpg", "cispo", "clip_cov", "kl_cov", "geo_mean", "dppo_tv", "dppo_kl",
                     "dro"]  # fmt: skip
AGGREGATIONS = Literal["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean",
                       "seq-mean-token-sum-norm"]  # fmt: skip

_MODEL = "actor_rollout_ref.model"
_ACTOR = "actor_rollout_ref.actor"
_OPTIM = f"{_ACTOR}.optim"
_FSDP = f"{_ACTOR}.fsdp_config"
_LOSS = f"{_ACTOR}.policy_loss"
_REF = "actor_rollout_ref.ref"

MODEL: tuple[Row, ...] = (
    unused("actor_rollout_ref.hybrid_engine", bool, True, "trainer and engine always share the device"),
    joins(f"{_MODEL}.path", str, "~/models/deepseek-llm-7b-chat", "model.path"),
    joins(f"{_MODEL}.lora_rank", Natural, 0, "adapter.rank", why="0, full fine-tuning, is refused"),
    joins(f"{_MODEL}.lora_alpha", Positive, 16, "adapter.alpha"),
    joins(f"{_MODEL}.target_modules", Texts, "all-linear", "adapter.target_modules"),
    joins(f"{_MODEL}.exclude_modules", Texts | None, None, "adapter.exclude_modules"),
    joins(f"{_MODEL}.lora_adapter_path", str | None, None, "adapter.path",
          why="rank, alpha and targets come from the adapter; the KL's reference is the adapter it started from, where "
          "verl takes the base (+lorl.algorithm.reference=base)"),
    refused(f"{_MODEL}.lora.*", Mapping, {}, MEGATRON),
    unused(f"{_MODEL}.lora.fully_sharded_loras", bool, False, "the engine reads the trainer's adapter"),
    refused(f"{_MODEL}.target_parameters", Any, None, "lorl adapts linear layers only; use target_modules"),
    sets(f"{_MODEL}.trust_remote_code", bool, False, "model.trust_remote_code"),
    sets(f"{_MODEL}.use_shm", bool, False, "model.use_shm"),
    sets(f"{_MODEL}.enable_gradient_checkpointing", bool, True, "model.gradient_checkpointing", only_given=True,
         why="lorl's own, auto, recomputes layers only where a GPU's memory asks for it"),
    sets(f"{_MODEL}.enable_activation_offload", bool, False, "model.activation_offload"),
    unused(f"{_MODEL}.use_remove_padding", bool, True, "batches are always packed"),
    unused(f"{_MODEL}.use_fused_kernels", bool, False, KERNELS),
    unused(f"{_MODEL}.fused_kernel_options.impl_backend", str | None, "torch", KERNELS),
    unused(f"{_MODEL}.use_liger", bool, False, KERNELS),
    unused(f"{_MODEL}.tiled_mlp.enabled", bool, False, PACKED),
    unused(f"{_MODEL}.tiled_mlp.num_shards", Count, 4, PACKED),
    refused(f"{_MODEL}.tokenizer_path", str | None, None, "lorl takes the base's own tokenizer"),
    refused(f"{_MODEL}.hf_config_path", str | None, None, "lorl takes the base's own config.json"),
    refused(f"{_MODEL}.custom_chat_template", str | None, None,
            "lorl takes the tokenizer's own chat template; write yours to its chat_template.jinja"),
    refused(f"{_MODEL}.external_lib", str | None, None, "lorl imports no code for the model"),
    refused(f"{_MODEL}.override_config.*", Mapping, {}, "lorl takes the base's own config.json; edit a copy of it"),
)  # fmt: skip

LOSS: tuple[Row, ...] = (
    joins(f"{_ACTOR}.ppo_mini_batch_size", Count, 256, "algorithm.minibatch_prompts",
          why="prompts in both; a default larger than the batch means the whole batch"),
    sets(f"{_ACTOR}.ppo_epochs", Count, 1, "algorithm.epochs"),
    refused(f"{_ACTOR}.shuffle", bool, False, "lorl takes mini-batches in the batch's order"),
    joins(f"{_ACTOR}.clip_ratio", NonNegative, 0.2, "algorithm.clip_low", "algorithm.clip_high",
          why="both bounds, where they are not given (verl reads it in no loss unless they are null)"),
    joins(f"{_ACTOR}.clip_ratio_low", NonNegative | None, 0.2, "algorithm.clip_low"),
    joins(f"{_ACTOR}.clip_ratio_high", NonNegative | None, 0.2, "algorithm.clip_high"),
    joins(f"{_ACTOR}.clip_ratio_c", Positive, 3.0, "algorithm.clip_dual", "algorithm.dppo_max_ratio",
          why="dual clip; with dppo_tv and dppo_kl the largest ratio"),
    sets(f"{_ACTOR}.loss_agg_mode", AGGREGATIONS, "token-mean", "algorithm.aggregation",
         why="always over the global batch; verl's depends on its micro-batches"),
    sets(f"{_ACTOR}.loss_scale_factor", Positive | None, None, "algorithm.aggregation_norm"),
    sets(f"{_ACTOR}.entropy_coeff", Number, 0, "algorithm.entropy_coef"),
    unused(f"{_ACTOR}.calculate_entropy", bool, False, "policy/entropy is always logged"),
    sets(f"{_ACTOR}.tau_pos", Positive, 1.0, "algorithm.sapo_tau_positive"),
    sets(f"{_ACTOR}.tau_neg", Positive, 1.05, "algorithm.sapo_tau_negative"),
    sets(f"{_LOSS}.loss_mode", LOSS_MODES, "vanilla", "algorithm.policy_loss",
         convert=lambda mode: {"vanilla": "ppo_clip", "geo_mean": "gmpo"}.get(mode, mode)),
    sets(f"{_LOSS}.clip_cov_ratio", Positive, 2e-4, "algorithm.clip_cov_ratio"),
    sets(f"{_LOSS}.clip_cov_lb", Number, 1.0, "algorithm.clip_cov_low"),
    sets(f"{_LOSS}.clip_cov_ub", Number, 5.0, "algorithm.clip_cov_high"),
    sets(f"{_LOSS}.kl_cov_ratio", Positive, 2e-4, "algorithm.kl_cov_ratio"),
    sets(f"{_LOSS}.ppo_kl_coef", NonNegative, 0.1, "algorithm.kl_cov_coef"),
    sets(f"{_LOSS}.dro_beta", Positive, 0.1, "algorithm.dro_beta"),
    joins(f"{_ACTOR}.use_kl_loss", bool, False, "algorithm.kl_in", "algorithm.kl_coef"),
    joins(f"{_ACTOR}.kl_loss_coef", NonNegative, 0.001, "algorithm.kl_coef", why="with use_kl_loss"),
    joins(f"{_ACTOR}.kl_loss_type", KL_TYPES, "low_var_kl", "algorithm.kl_estimator",
          why="with use_kl_loss; k3 is verl's low_var_kl, clamped at 10"),
    unused(f"{_ACTOR}.calculate_sum_pi_squared", bool, False, "computed where the estimator reads it"),
    unused(f"{_ACTOR}.sum_pi_squared_checkpointing", bool, False, KERNELS),
)  # fmt: skip

OPTIM: tuple[Row, ...] = (
    sets(f"{_OPTIM}.lr", Positive, 1e-6, "optim.lr", why="verl's default suits full fine-tuning, not adapters"),
    sets(f"{_OPTIM}.weight_decay", NonNegative, 0.01, "optim.weight_decay"),
    sets(f"{_OPTIM}.betas", list[Fraction], [0.9, 0.999], "optim.betas"),
    joins(f"{_OPTIM}.clip_grad", Positive | None, 1.0, "optim.max_grad_norm"),
    joins(f"{_ACTOR}.grad_clip", Positive | None, 1.0, "optim.max_grad_norm"),
    joins(f"{_OPTIM}.lr_warmup_steps", OrMinusOne, -1, "optim.warmup_steps", why="-1: lr_warmup_steps_ratio"),
    joins(f"{_OPTIM}.lr_warmup_steps_ratio", Fraction, 0.0, "optim.warmup_steps",
          why="of trainer.total_training_steps, which it needs"),
    sets(f"{_OPTIM}.lr_scheduler_type", Literal["constant", "cosine"] | None, "constant", "optim.schedule",
         convert=lambda kind: kind or "constant", spellings=(f"{_OPTIM}.warmup_style",)),
    sets(f"{_OPTIM}.min_lr_ratio", Fraction | None, 0.0, "optim.min_lr_ratio", convert=lambda ratio: ratio or 0.0),
    refused(f"{_OPTIM}.num_cycles", Positive, 0.5, "lorl's cosine falls once, half a cycle"),
    refused(f"{_OPTIM}.total_training_steps", OrMinusOne, -1, "set trainer.total_training_steps"),
    refused(f"{_OPTIM}.optimizer", str, "AdamW", "lorl trains adapters with AdamW"),
    refused(f"{_OPTIM}.optimizer_impl", str, "torch.optim", "lorl trains adapters with torch.optim.AdamW"),
)  # fmt: skip

LAYOUT: tuple[Row, ...] = (
    sets(f"{_ACTOR}.strategy", Literal["fsdp", "fsdp2"], "fsdp", "parallel.strategy", convert=lambda _: "auto",
         why="lorl picks: an adapter's gradients are small, and a base that fits a GPU is not cut"),
    joins(f"{_ACTOR}.use_dynamic_bsz", bool, False, "parallel.microbatch_tokens", why=PACKED),
    joins(f"{_ACTOR}.ppo_max_token_len_per_gpu", Count, 16384, "parallel.microbatch_tokens",
          why="with use_dynamic_bsz"),
    unused(f"{_ACTOR}.ppo_micro_batch_size", Count | None, None, PACKED),
    unused(f"{_ACTOR}.ppo_micro_batch_size_per_gpu", Count | None, None, PACKED),
    joins(f"{_ACTOR}.ulysses_sequence_parallel_size", Count, 1, "parallel.sequence",
          why="must divide the number of GPUs and of attention heads"),
    sets(f"{_FSDP}.dtype", Literal["bfloat16", "float32"], "bfloat16", "model.dtype", only_given=True,
         why="not given: bfloat16 on a GPU, float32 on the CPU"),
    unused(f"{_FSDP}.model_dtype", Literal["fp32", "float32", "bf16", "bfloat16", "fp16", "float16"], "fp32",
           "the frozen base needs no master copy, and the adapter's masters are float32"),
    unused(f"{_FSDP}.fsdp_size", OrMinusOne, -1, SHARED_BASE),
    unused(f"{_FSDP}.param_offload", bool, False, f"{SHARED_BASE} (+lorl.parallel.param_offload=true streams it)"),
    sets(f"{_FSDP}.optimizer_offload", bool, False, "parallel.optimizer_offload",
         why="the adapter's AdamW state: the frozen base has none"),
    unused(f"{_FSDP}.offload_policy", bool, False, SHARED_BASE),
    unused(f"{_FSDP}.reshard_after_forward", bool, True, SHARED_BASE),
    unused(f"{_FSDP}.forward_prefetch", bool, False, SHARED_BASE),
    unused(f"{_FSDP}.use_orig_params", bool, False, SHARED_BASE),
    unused(f"{_FSDP}.wrap_policy.*", Mapping, {}, SHARED_BASE),
    unused(f"{_FSDP}.seed", Natural, 42, ONE_SEED),
    unused(f"{_ACTOR}.data_loader_seed", Natural | None, 42, ONE_SEED),
    unused(f"{_ACTOR}.use_torch_compile", bool, True, KERNELS),
    unused(f"{_ACTOR}.entropy_from_logits_with_chunking", bool, False, KERNELS),
    unused(f"{_ACTOR}.entropy_checkpointing", bool, False, KERNELS),
    refused(f"{_ACTOR}.freeze_vision_tower", bool, False, VISION),
    unused(f"{_ACTOR}.checkpoint.save_contents", list[str], ["model", "optimizer", "extra"], ALWAYS_SAVED),
    unused(f"{_ACTOR}.checkpoint.load_contents", list[str], ["model", "optimizer", "extra"], ALWAYS_SAVED),
    unused(f"{_ACTOR}.checkpoint.async_save", bool, False, "saving an adapter takes no time worth hiding"),
    unused(f"{_ACTOR}.checkpoint.save_lora_only", bool, False, ALWAYS_SAVED),
    refused(f"{_ACTOR}.megatron.*", Mapping, {}, MEGATRON),
    refused(f"{_ACTOR}.router_replay.*", Mapping, {}, "lorl has no router replay"),
    refused(f"{_ACTOR}.profiler.*", Mapping, {}, PROFILER),
    unused(f"{_REF}.strategy", Literal["fsdp", "fsdp2"], "fsdp", "the reference is the actor's base"),
    unused(f"{_REF}.log_prob_micro_batch_size", Count | None, None, PACKED),
    unused(f"{_REF}.log_prob_micro_batch_size_per_gpu", Count | None, None, PACKED),
    unused(f"{_REF}.log_prob_use_dynamic_bsz", bool, False, PACKED),
    unused(f"{_REF}.log_prob_max_token_len_per_gpu", Count, 16384, PACKED),
    unused(f"{_REF}.fsdp_config.*", Mapping, {}, "the reference is the actor's base"),
    unused(f"{_REF}.ulysses_sequence_parallel_size", Count, 1, "the reference's passes are split as the actor's are"),
    unused(f"{_REF}.use_torch_compile", bool, True, KERNELS),
    unused(f"{_REF}.entropy_from_logits_with_chunking", bool, False, KERNELS),
    unused(f"{_REF}.entropy_checkpointing", bool, False, KERNELS),
    refused(f"{_REF}.model.path", str | None, None, "the reference is the actor's own base or starting adapter"),
    refused(f"{_REF}.megatron.*", Mapping, {}, MEGATRON),
)  # fmt: skip

ROWS = MODEL + LOSS + OPTIM + LAYOUT
