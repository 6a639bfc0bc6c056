"""actor_rollout_ref.rollout.*: how completions are sampled, in training and in validation."""

from typing import Literal

from lorl.verl.actor_rows import PACKED, PROFILER
from lorl.verl.rows import (
    AboveZero,
    Count,
    Mapping,
    Natural,
    NonNegative,
    OrMinusOne,
    Row,
    Share,
    joins,
    refused,
    sets,
    unused,
)

ENGINE = "the engine is set up by lorl"
SYNC = "the engine reads the trainer's base, and only the adapter is published to it"
TURNS = "lorl samples one turn a prompt"

_ROLLOUT = "actor_rollout_ref.rollout"
_VAL = f"{_ROLLOUT}.val_kwargs"

ROWS: tuple[Row, ...] = (
    joins(f"{_ROLLOUT}.name", Literal["vllm", "hf"] | None, None, "rollout.engine",
          why="hf: the embedded torch engine; vllm: auto, the best engine that this lorl and this machine have"),
    unused(f"{_ROLLOUT}.mode", Literal["async", "sync"], "async", "completions are graded as each is finished"),
    sets(f"{_ROLLOUT}.n", Count, 1, "rollout.n"),
    sets(f"{_ROLLOUT}.temperature", NonNegative, 1.0, "rollout.temperature"),
    sets(f"{_ROLLOUT}.top_k", OrMinusOne, -1, "rollout.top_k"),
    sets(f"{_ROLLOUT}.top_p", AboveZero, 1.0, "rollout.top_p"),
    refused(f"{_ROLLOUT}.do_sample", bool, True, "greedy samples are all equal and teach nothing"),
    sets(f"{_ROLLOUT}.ignore_eos", bool, False, "rollout.ignore_eos"),
    joins(f"{_ROLLOUT}.prompt_length", Count | None, None, why="must be data.max_prompt_length"),
    joins(f"{_ROLLOUT}.response_length", Count | None, None, why="must be data.max_response_length"),
    joins(f"{_ROLLOUT}.max_model_len", Count | None, None,
          why="must hold a prompt and a response; the cache grows as they do"),
    joins(f"{_ROLLOUT}.tensor_model_parallel_size", Count, 2,
          why="must divide the number of GPUs; lorl lays out the engine"),
    refused(f"{_ROLLOUT}.data_parallel_size", Count, 1, ENGINE),
    refused(f"{_ROLLOUT}.pipeline_model_parallel_size", Count, 1, ENGINE),
    refused(f"{_ROLLOUT}.expert_parallel_size", Count, 1, ENGINE),
    sets(f"{_ROLLOUT}.gpu_memory_utilization", Share, 0.5, "rollout.memory_fraction", only_given=True,
         why="lorl's is the KV cache's share alone, since the weights are the trainer's"),
    sets(f"{_ROLLOUT}.max_num_seqs", Count, 256, "rollout.max_concurrent"),
    unused(f"{_ROLLOUT}.max_num_batched_tokens", Count, 8192, ENGINE),
    unused(f"{_ROLLOUT}.enable_chunked_prefill", bool, True, ENGINE),
    unused(f"{_ROLLOUT}.enable_prefix_caching", bool, True, "a prompt is computed once for all its samples"),
    unused(f"{_ROLLOUT}.enforce_eager", bool, False, ENGINE),
    unused(f"{_ROLLOUT}.free_cache_engine", bool, True, "the engine gives its KV cache back while the policy trains"),
    unused(f"{_ROLLOUT}.load_format",
           Literal["dummy", "safetensors", "auto", "hf", "dummy_hf", "dummy_dtensor", "dummy_megatron"], "dummy", SYNC),
    unused(f"{_ROLLOUT}.layered_summon", bool, False, SYNC),
    unused(f"{_ROLLOUT}.dtype", Literal["bfloat16", "float32", "auto"], "bfloat16", "the base's own type, model.dtype"),
    unused(f"{_ROLLOUT}.calculate_log_probs", bool, True, "the engine's log-probabilities are always kept"),
    refused(f"{_ROLLOUT}.logprobs_mode", str | None, "processed_logprobs",
            "lorl keeps the log-probabilities of what was sampled from"),
    joins(f"{_ROLLOUT}.seed", Natural | None, None, "seed", why="where data.seed is not given"),
    unused(f"{_ROLLOUT}.full_determinism", bool, False, "the embedded engine's draws never depend on the batch"),
    unused(f"{_ROLLOUT}.log_prob_micro_batch_size", Count | None, None, PACKED),
    unused(f"{_ROLLOUT}.log_prob_micro_batch_size_per_gpu", Count | None, None, PACKED),
    unused(f"{_ROLLOUT}.log_prob_use_dynamic_bsz", bool, False, PACKED),
    unused(f"{_ROLLOUT}.log_prob_max_token_len_per_gpu", Count, 16384, PACKED),
    unused(f"{_ROLLOUT}.checkpoint_engine.*", Mapping, {}, SYNC),
    refused(f"{_ROLLOUT}.over_sample_rate", NonNegative, 0, "lorl waits for every sample"),
    refused(f"{_ROLLOUT}.engine_kwargs.*", Mapping, {}, "lorl passes nothing through to an engine; use its own keys"),
    unused(f"{_ROLLOUT}.agent.num_workers", Count, 8, "one process drives the engine"),
    refused(f"{_ROLLOUT}.agent.default_agent_loop", str, "single_turn_agent", TURNS),
    refused(f"{_ROLLOUT}.agent.agent_loop_config_path", str | None, None, TURNS),
    refused(f"{_ROLLOUT}.multi_turn.enable", bool, False, TURNS),
    unused(f"{_ROLLOUT}.multi_turn.*", Mapping, {}, TURNS),
    refused(f"{_ROLLOUT}.profiler.*", Mapping, {}, PROFILER),
    refused("skip.rollout.*", Mapping, {}, "lorl always samples"),
    refused(f"{_ROLLOUT}.skip_rollout", bool, False, "lorl always samples"),
    unused("actor_rollout_ref.nccl_timeout", Count, 600, "there is no collective to time out"),
    joins(f"{_VAL}.n", Count, 1, "eval.n"),
    joins(f"{_VAL}.temperature", NonNegative, 0, "eval.temperature"),
    joins(f"{_VAL}.do_sample", bool, False, "eval.temperature", why="False: 0"),
    sets(f"{_VAL}.top_k", OrMinusOne, -1, "eval.top_k"),
    sets(f"{_VAL}.top_p", AboveZero, 1.0, "eval.top_p"),
)  # fmt: skip
