"""data.*, algorithm.* and the reward: what is trained on, and towards what."""

from typing import Literal

from lorl.algorithms.names import ADVANTAGES, ALIASES
from lorl.verl.actor_rows import KL_TYPES, PACKED, VISION
from lorl.verl.rows import (
    AboveZero,
    Bound,
    Count,
    Fraction,
    Mapping,
    Natural,
    NonNegative,
    OrMinusOne,
    Positive,
    Row,
    Texts,
    joins,
    minus_one_is_off,
    refused,
    sets,
    unused,
)

WORKERS = "prompts are read and tokenised once, at the start"
REWARD_MODEL_ON_BASE = "the reward model runs in the processes that train, on the shared base where it can"

# verl's estimators; gpg and gdpo differ from their papers, and under verl's names do as verl does.
_ESTIMATORS = Literal["gae", "gdpo", "gpg", "grpo", "grpo_passk", "grpo_vectorized", "opo", "optimal_token_baseline",
                      "reinforce_plus_plus", "reinforce_plus_plus_baseline", "remax", "rloo", "rloo_vectorized",
                      "tir_optimal_token_baseline"]  # fmt: skip


def _estimator(name: str) -> str:
    name = ALIASES.get(name, name)
    return f"{name}_verl" if f"{name}_verl" in ADVANTAGES else name


DATA: tuple[Row, ...] = (
    joins("data.train_files", Texts, "~/data/rlhf/gsm8k/train.parquet", "data.train"),
    joins("data.val_files", Texts | None, "~/data/rlhf/gsm8k/test.parquet", "data.val"),
    joins("data.train_batch_size", Count, 1024, "data.prompts_per_step", why="prompts in both"),
    unused("data.val_batch_size", Count | None, None, "validation answers the whole set, as much at a time as fits"),
    unused("data.gen_batch_size", Count | None, None, "filter_groups samples as many prompts anew as are missing"),
    sets("data.max_prompt_length", Count, 512, "data.max_prompt_tokens"),
    sets("data.max_response_length", Count, 512, "rollout.max_response_tokens"),
    joins("data.filter_overlong_prompts", bool, False, "data.overlong", why="True: skip, and each is listed"),
    joins("data.truncation", Literal["error", "left", "right", "middle"], "error", "data.overlong",
          why="where filter_overlong_prompts is False; middle is refused"),
    sets("data.shuffle", bool, True, "data.shuffle"),
    joins("data.seed", Natural | None, None, "seed", why="null: rollout.seed, or lorl's 0"),
    sets("data.train_max_samples", OrMinusOne, -1, "data.max_train_prompts", convert=minus_one_is_off),
    sets("data.val_max_samples", OrMinusOne, -1, "data.max_val_prompts", convert=minus_one_is_off),
    sets("data.prompt_key", str, "prompt", "data.prompt_key"),
    sets("data.reward_fn_key", str, "data_source", "data.source_key"),
    sets("data.apply_chat_template_kwargs.*", Mapping, {}, "data.chat_template_kwargs"),
    refused("data.tokenizer", str | None, None, "lorl takes the base's own tokenizer"),
    unused("data.return_raw_chat", bool, True, "prompts keep their messages"),
    unused("data.return_raw_input_ids", bool, False, "prompts keep their tokens"),
    unused("data.return_full_prompt", bool, False, "prompts keep their text"),
    unused("data.validation_shuffle", bool, False, "validation answers the whole set"),
    unused("data.dataloader_num_workers", Natural, 8, WORKERS),
    unused("data.filter_overlong_prompts_workers", Count | None, 1, WORKERS),
    unused("data.use_shm", bool, False, WORKERS),
    refused("data.trust_remote_code", bool, False, "lorl runs no code for data"),
    refused("data.custom_cls.*", Mapping, {}, "lorl reads parquet and JSON files itself; write yours as one of them"),
    refused("data.custom_cls.path", str | None, None, "lorl reads parquet and JSON files itself"),
    refused("data.custom_cls.name", str | None, None, "lorl reads parquet and JSON files itself"),
    refused("data.sampler.class_path", str | None, None, "lorl has its own counted sampler"),
    refused("data.sampler.class_name", str | None, None, "lorl has its own counted sampler"),
    refused("data.image_key", str, "images", VISION, off=()),
    refused("data.video_key", str, "videos", VISION, off=()),
)  # fmt: skip

_CORRECTION = "algorithm.rollout_correction"
ALGORITHM: tuple[Row, ...] = (
    sets("algorithm.adv_estimator", _ESTIMATORS, "gae", "algorithm.advantage", convert=_estimator,
         why="gpg and gdpo as verl has them; gae trains a critic"),
    sets("algorithm.gamma", AboveZero, 1.0, "algorithm.gamma"),
    sets("algorithm.lam", Fraction, 1.0, "algorithm.lam"),
    sets("algorithm.norm_adv_by_std_in_grpo", bool, True, "algorithm.normalize_std"),
    joins("algorithm.gdpo_reward_keys", list[str] | None, None, "algorithm.reward_weights"),
    joins("algorithm.gdpo_reward_weights", list[float] | None, None, "algorithm.reward_weights"),
    joins("algorithm.use_kl_in_reward", bool, False, "algorithm.kl_in", "algorithm.kl_coef"),
    joins("algorithm.kl_penalty", KL_TYPES, "kl", "algorithm.kl_estimator", why="with use_kl_in_reward"),
    joins("algorithm.kl_ctrl.kl_coef", NonNegative, 0.001, "algorithm.kl_coef", why="with use_kl_in_reward"),
    joins("algorithm.kl_ctrl.type", Literal["fixed", "adaptive"], "fixed", "algorithm.kl_control",
          why="with use_kl_in_reward"),
    joins("algorithm.kl_ctrl.horizon", Count, 10000, "algorithm.kl_horizon", why="with use_kl_in_reward"),
    joins("algorithm.kl_ctrl.target_kl", Positive, 0.1, "algorithm.kl_target", why="with use_kl_in_reward"),
    refused("algorithm.use_pf_ppo", bool, False, "lorl has no PF-PPO"),
    unused("algorithm.pf_ppo.*", Mapping, {}, "lorl has no PF-PPO"),
    joins("algorithm.filter_groups.enable", bool, False, "algorithm.dynamic_sampling"),
    joins("algorithm.filter_groups.max_num_gen_batches", Natural, 0, "algorithm.max_refills",
          why="0: no limit; otherwise one refill less than generations"),
    joins("algorithm.filter_groups.metric", Literal["acc", "score", "seq_reward", "seq_final_reward"] | None, None,
          why="lorl filters by the reward that is trained on"),
    joins(f"{_CORRECTION}.rollout_is", Literal["token", "sequence"] | None, None, "correction.importance"),
    joins(f"{_CORRECTION}.rollout_is_threshold", Bound, 2.0, "correction.lower", "correction.upper",
          why='a bound, or "lower_upper"'),
    joins(f"{_CORRECTION}.rollout_rs", str | None, None, "correction.reject"),
    joins(f"{_CORRECTION}.rollout_rs_threshold", Bound | None, None, "correction.reject"),
    joins(f"{_CORRECTION}.rollout_is_batch_normalize", bool, False, "correction.normalize", why="with rollout_is"),
    sets(f"{_CORRECTION}.bypass_mode", bool, False, "correction.bypass"),
    joins(f"{_CORRECTION}.loss_type", Literal["ppo_clip", "reinforce"], "ppo_clip", "correction.bypass_loss",
         why="with bypass_mode"),
)  # fmt: skip

_REWARD = "reward.reward_kwargs"
_OVERLONG = f"{_REWARD}.overlong_buffer_cfg"
_MODEL = "reward.reward_model"


def _older(key: str) -> tuple[str, ...]:
    """The spellings of reward.reward_kwargs.X before reward.* was a section, and of DAPO's recipe."""
    tail = key.removeprefix(f"{_REWARD}.")
    recipe = (tail.replace("overlong_buffer_cfg", "reward_model.overlong_buffer", 1),) if "cfg" in tail else ()
    return (f"reward_model.reward_kwargs.{tail}", *recipe)


REWARD: tuple[Row, ...] = (
    joins("reward.custom_reward_function.path", str | None, None, "reward.path",
          why="a .py file; pkg:// is refused", spellings=("custom_reward_function.path",)),
    joins("reward.custom_reward_function.name", str | None, "compute_score", "reward.name",
          spellings=("custom_reward_function.name",)),
    joins("reward.custom_reward_function.reward_kwargs.*", Mapping, {}, "reward.kwargs",
          spellings=("custom_reward_function.reward_kwargs.*",)),
    joins("reward.reward_manager.name", Literal["naive", "dapo", "batch"], "naive", "reward.batched",
          why="batch: one call for the step's samples; dapo: its overlong penalty",
          spellings=("reward_model.reward_manager", "reward_manager.name")),
    refused("reward.reward_manager.source", str, "register", "write the reward as a function in a file of yours",
            spellings=("reward_manager.source",)),
    refused("reward.reward_manager.module.*", Mapping, {}, "write the reward as a function in a file of yours",
            spellings=("reward_manager.module.*",)),
    *(joins(key, type, default, *lorl, why="with the dapo manager", spellings=_older(key))
      for key, type, default, lorl in (
          (f"{_OVERLONG}.enable", bool, False, ("algorithm.overlong_buffer_tokens",)),
          (f"{_OVERLONG}.len", Natural, 0, ("algorithm.overlong_buffer_tokens",)),
          (f"{_OVERLONG}.penalty_factor", NonNegative, 0.0, ("algorithm.overlong_penalty",)),
          (f"{_OVERLONG}.log", bool, False, ()),
      )),
    joins(f"{_REWARD}.max_resp_len", Count | None, None, why="must be data.max_response_length",
          spellings=_older(f"{_REWARD}.max_resp_len")),
    joins(f"{_REWARD}.*", Mapping, {}, "reward.kwargs", why="with the batch manager",
          spellings=("reward_model.reward_kwargs.*",)),
    sets("reward.num_workers", Count, 1, "reward.workers", only_given=True, spellings=("reward_model.num_workers",)),
    unused("reward_model.use_reward_loop", bool, True, "each sample is graded as soon as it is finished"),
    unused("reward_model.launch_reward_fn_async", bool, False, "each sample is graded as soon as it is finished"),
    refused("reward.sandbox_fusion.*", Mapping, {}, "lorl grades in its own worker processes",
            spellings=("reward_model.sandbox_fusion.*",)),
    refused("reward.sandbox_fusion.url", str | None, None, "lorl grades in its own worker processes",
            spellings=("reward_model.sandbox_fusion.url",)),
    joins(f"{_MODEL}.enable", bool, False, "reward_model.path", spellings=("reward_model.enable",),
          why="as in verl, its score then takes the rule's place (reward_model.rule_weight=0)"),
    joins(f"{_MODEL}.model_path", str | None, None, "reward_model.path", spellings=("reward_model.model.path",)),
    unused("reward_model.strategy", Literal["fsdp", "fsdp2"], "fsdp", REWARD_MODEL_ON_BASE),
    unused("reward_model.micro_batch_size", Count | None, None, PACKED),
    unused("reward_model.micro_batch_size_per_gpu", Count | None, None, PACKED),
    unused("reward_model.use_dynamic_bsz", bool, False, PACKED),
    unused("reward_model.forward_max_token_len_per_gpu", Count, 32768, PACKED),
    unused("reward_model.model.use_remove_padding", bool, False, PACKED),
    unused("reward_model.model.fsdp_config.*", Mapping, {}, REWARD_MODEL_ON_BASE),
    refused("reward_model.model.input_tokenizer", str | None, None,
            "a reward model on the shared base reads the base's own tokens"),
    refused(f"{_MODEL}.enable_resource_pool", bool, False, REWARD_MODEL_ON_BASE,
            spellings=("reward_model.enable_resource_pool",)),
    unused(f"{_MODEL}.n_gpus_per_node", Natural, 8, REWARD_MODEL_ON_BASE, spellings=("reward_model.n_gpus_per_node",)),
    unused(f"{_MODEL}.nnodes", Natural, 0, REWARD_MODEL_ON_BASE, spellings=("reward_model.nnodes",)),
    unused(f"{_MODEL}.rollout.*", Mapping, {}, REWARD_MODEL_ON_BASE, spellings=("reward_model.rollout.*",)),
)  # fmt: skip

ROWS = DATA + ALGORITHM + REWARD
