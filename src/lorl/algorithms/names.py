"""Names of the built-in algorithms, for messages that must not wait for torch to load. A test holds them complete."""

ADVANTAGES = (
    "gae",
    "gdpo",
    "gdpo_verl",
    "gpg",
    "gpg_verl",
    "grpo",
    "grpo_passk",
    "opo",
    "optimal_token_baseline",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "rloo",
)
POLICY_LOSSES = (
    "cispo",
    "clip_cov",
    "dppo_kl",
    "dppo_tv",
    "dro",
    "gmpo",
    "gpg",
    "gspo",
    "kl_cov",
    "ppo_clip",
    "reinforce",
    "sapo",
)
KL_ESTIMATORS = ("abs", "full", "k1", "k2", "k3", "low_var_kl")

# Those that compare the answers to one prompt, and so need at least two (see `AdvantageEntry.check_group`).
NEED_A_GROUP = frozenset(ADVANTAGES) - {"gae", "reinforce_plus_plus", "remax"}

# Second names, verl's mostly. A KL estimator may carry a "+" besides (see `lorl.algorithms.kl`).
ALIASES = {
    "grpo_vectorized": "grpo",
    "rloo_vectorized": "rloo",
    "tir_optimal_token_baseline": "optimal_token_baseline",
    "geo_mean": "gmpo",
    "vanilla": "ppo_clip",
    "kl": "k1",
    "mse": "k2",
}
