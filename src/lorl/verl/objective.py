"""The keys of verl's objective that say something only together: batches, KL, clipping, rewards, critic.

Each function gives lorl's keys for one such group. What verl reads and then ignores is told in `values`; what cannot
hold together is a UserError in verl's names.
"""

from collections.abc import Callable
from os.path import expanduser

from lorl.algorithms.names import ALIASES
from lorl.verl.values import Lorl, Values

_ACTOR = "actor_rollout_ref.actor"
_MODEL = "actor_rollout_ref.model"
_REWARD = "reward.reward_kwargs"
_BUFFER = f"{_REWARD}.overlong_buffer_cfg"


def of_every_run(values: Values) -> Lorl:
    """What verl does in all its runs, and lorl only when told to."""
    return {"algorithm.group_of_one": "reward"}


def batch(values: Values) -> Lorl:
    """verl counts both in prompts, before the samples of each."""
    prompts, mini_key = values["data.train_batch_size"], f"{_ACTOR}.ppo_mini_batch_size"
    mini = values[mini_key]
    if mini > prompts and not values.has(mini_key):
        mini = prompts
    if mini > prompts:
        values.fail(mini_key, f"more than {values.spelled('data.train_batch_size')}; both count prompts")
    if prompts % mini:
        divisor = next(d for d in range(mini, 0, -1) if prompts % d == 0)
        values.fail(mini_key, f"does not divide {values.spelled('data.train_batch_size')}; a divisor is {divisor}")
    return {"data.prompts_per_step": prompts, "algorithm.minibatch_prompts": None if mini == prompts else mini}


def kl(values: Values) -> Lorl:
    in_loss, in_reward = values[f"{_ACTOR}.use_kl_loss"], values["algorithm.use_kl_in_reward"]
    loss_keys = [f"{_ACTOR}.kl_loss_coef", f"{_ACTOR}.kl_loss_type"]
    control = [f"algorithm.kl_ctrl.{name}" for name in ("type", "horizon", "target_kl")]
    reward_keys = ["algorithm.kl_penalty", "algorithm.kl_ctrl.kl_coef", *control]
    if in_loss and in_reward:
        values.fail("algorithm.use_kl_in_reward", f"lorl puts the KL in one place; with {_ACTOR}.use_kl_loss drop one")
    if not in_loss:
        values.idle(f"{_ACTOR}.use_kl_loss is False", *loss_keys)
    if not in_reward:
        values.idle("algorithm.use_kl_in_reward is False", *reward_keys)
    if in_loss:
        coef, kind = (values[key] for key in loss_keys)
        return {"algorithm.kl_in": "loss", "algorithm.kl_coef": coef, "algorithm.kl_estimator": _kl_name(kind)}
    if in_reward:
        return {
            "algorithm.kl_in": "reward",
            "algorithm.kl_coef": values["algorithm.kl_ctrl.kl_coef"],
            "algorithm.kl_estimator": _kl_name(values["algorithm.kl_penalty"]),
            "algorithm.kl_control": values["algorithm.kl_ctrl.type"],
            "algorithm.kl_horizon": values["algorithm.kl_ctrl.horizon"],
            "algorithm.kl_target": values["algorithm.kl_ctrl.target_kl"],
        }
    return {"algorithm.kl_coef": 0.0}


def _kl_name(name: str) -> str:
    """verl's k3 is clamped, which lorl calls low_var_kl."""
    bare, plus = name.removesuffix("+"), "+" if name.endswith("+") else ""
    return ("low_var_kl" if bare == "k3" else ALIASES.get(bare, bare)) + plus


def clipping(values: Values) -> Lorl:
    """verl reads clip_ratio only where the bounds are null, which they are not by default: here it sets both."""
    both = values[f"{_ACTOR}.clip_ratio"]

    def bound(key: str) -> float:
        return values[key] if values.has(key) and values[key] is not None else both

    low, high = bound(f"{_ACTOR}.clip_ratio_low"), bound(f"{_ACTOR}.clip_ratio_high")
    if low >= 1:
        key = f"{_ACTOR}.clip_ratio_low"
        values.fail(key if values.has(key) else f"{_ACTOR}.clip_ratio", "the lower bound must be below 1")
    dual = values[f"{_ACTOR}.clip_ratio_c"]
    if dual <= 1:
        values.fail(f"{_ACTOR}.clip_ratio_c", "expected a number > 1")
    return {
        "algorithm.clip_low": low,
        "algorithm.clip_high": high,
        "algorithm.clip_dual": dual,
        "algorithm.dppo_max_ratio": dual,
    }


def optimizer(values: Values) -> Lorl:
    optim = f"{_ACTOR}.optim"
    clips = [key for key in (f"{_ACTOR}.grad_clip", f"{optim}.clip_grad") if values.has(key)]
    if len(clips) == 2 and values[clips[0]] != values[clips[1]]:
        values.fail(clips[1], f"contradicts {values.spelled(clips[0])}")
    steps, share = values[f"{optim}.lr_warmup_steps"], values[f"{optim}.lr_warmup_steps_ratio"]
    total = values["trainer.total_training_steps"]
    if steps < 0 and share and total is None:
        values.fail(
            f"{optim}.lr_warmup_steps_ratio",
            f"a share of trainer.total_training_steps, which is not set; set it, or {optim}.lr_warmup_steps",
        )
    return {
        "optim.max_grad_norm": values[clips[0]] if clips else values[f"{_ACTOR}.grad_clip"],
        "optim.warmup_steps": steps if steps >= 0 else int(share * (total or 0)),
    }


def dynamic_sampling(values: Values) -> Lorl:
    on, most, metric = (f"algorithm.filter_groups.{name}" for name in ("enable", "max_num_gen_batches", "metric"))
    if not values[on]:
        values.idle("algorithm.filter_groups.enable is False", most, metric)
        return {}
    if values[most] == 1:
        values.fail(most, "leaves no refill, so that filter_groups could do nothing; use 2 or more, or 0 for no limit")
    if values[metric] == "acc":
        values.note(f"{values.spelled(metric)}: groups are filtered by the reward that is trained on")
    return {"algorithm.dynamic_sampling": True, "algorithm.max_refills": values[most] - 1 if values[most] else 1000}


def reward_weights(values: Values) -> Lorl:
    keys, weights = "algorithm.gdpo_reward_keys", "algorithm.gdpo_reward_weights"
    if values[keys] is None:
        if values[weights] is not None:
            values.fail(weights, f"set {keys} too, which names what they weigh")
        return {}
    if values["algorithm.adv_estimator"] != "gdpo":
        values.idle("algorithm.adv_estimator is not gdpo", keys, weights)
        return {}
    numbers = values[weights] or [1.0] * len(values[keys])
    if len(numbers) != len(values[keys]):
        values.fail(weights, f"{len(numbers)} weights for the {len(values[keys])} names of {keys}")
    return {"algorithm.reward_weights": dict(zip(values[keys], map(float, numbers), strict=True))}


def correction(values: Values) -> Lorl:
    level, bound, normalize, modes, bounds, bypass, loss = (
        f"algorithm.rollout_correction.{name}"
        for name in (
            "rollout_is",
            "rollout_is_threshold",
            "rollout_is_batch_normalize",
            "rollout_rs",
            "rollout_rs_threshold",
            "bypass_mode",
            "loss_type",
        )
    )
    found: Lorl = {}
    if values[bypass]:
        found["correction.bypass_loss"] = values[loss]
    else:
        values.idle("bypass_mode is False", loss)
    if values[level] is None:
        values.idle("rollout_is is null", bound, normalize)
    else:
        from lorl.algorithms.correction import parse_bounds  # imports torch

        lower, upper = parse_bounds(values[bound], bound)
        found |= {"correction.importance": values[level], "correction.lower": lower, "correction.upper": upper}
        found["correction.normalize"] = values[normalize]
    if values[modes] is None:
        values.idle("rollout_rs is null", bounds)
        return found
    if values[bounds] is None:
        values.fail(modes, f"set {bounds} too: what is over it is rejected")
    from lorl.algorithms.correction import parse_rejections

    tests = parse_rejections(values[modes], values[bounds], modes)
    return found | {
        "correction.reject": [
            f"{test.mode}:{test.upper:g}" if test.lower is None else f"{test.mode}:{test.lower:g}_{test.upper:g}"
            for test in tests
        ]
    }


def reward(values: Values) -> Lorl:
    path, name, kwargs = (f"reward.custom_reward_function.{part}" for part in ("path", "name", "reward_kwargs.*"))
    manager = values["reward.reward_manager.name"]
    found: Lorl = {"reward.kwargs": dict(values[kwargs])}
    if values[path] is None:
        if values.has(name) and values[name] != "compute_score":
            values.fail(name, f"set {path} too, to the file that holds it")
        if manager == "batch":
            values.fail("reward.reward_manager.name", f"calls a function of yours; set {path}")
    else:
        if "://" in values[path]:
            values.fail(path, "lorl takes the path of a .py file")
        found |= {"reward.path": expanduser(values[path]), "reward.name": values[name] or "compute_score"}
    extra = values[f"{_REWARD}.*"]
    if manager == "batch":
        found |= {"reward.batched": True, "reward.kwargs": found["reward.kwargs"] | extra}
    elif extra:
        values.fail(f"{_REWARD}.*", f"the {manager} manager takes no {next(iter(extra))!r}; use {kwargs[:-2]}")
    return found | _overlong(values, manager) | _reward_model(values)


def _overlong(values: Values, manager: str) -> Lorl:
    on, length, factor, log = (f"{_BUFFER}.{name}" for name in ("enable", "len", "penalty_factor", "log"))
    if not values[on]:
        values.idle(f"{on} is False", length, factor, log)
        return {}
    if manager != "dapo":
        values.fail(on, f"only the dapo manager reads it; set {values.spelled('reward.reward_manager.name')} to dapo")
    if not 0 < values[length] <= values["data.max_response_length"]:
        values.fail(length, f"must lie between 1 and {values.spelled('data.max_response_length')}")
    values.idle("the penalty is part of the logged reward", log)
    penalty = values[factor] if values.has(factor) else 1.0
    return {"algorithm.overlong_buffer_tokens": values[length], "algorithm.overlong_penalty": penalty}


def _reward_model(values: Values) -> Lorl:
    on, path = "reward.reward_model.enable", "reward.reward_model.model_path"
    if not values[on]:
        values.idle(f"{on} is False", path)
        return {}
    if values[path] is None:
        values.fail(on, f"set {path} too, to an adapter with a score head or a sequence classifier")
    if values["reward.custom_reward_function.path"] is not None:
        values.fail(on, "verl leaves the custom reward function out then; to mix both use lorl's YAML, reward_model.*")
    return {"reward_model.path": expanduser(values[path]), "reward_model.rule_weight": 0.0}


def critic(values: Values) -> Lorl:
    enabled, estimator = values["critic.enable"], values["algorithm.adv_estimator"]
    if enabled is not None and enabled != (estimator == "gae"):
        needs = "needs" if estimator == "gae" else "has no use for"
        values.fail("critic.enable", f"{values.spelled('algorithm.adv_estimator')} {needs} a critic")
    ours = {
        "critic.rank": "critic.model.lora_rank",
        "critic.alpha": "critic.model.lora_alpha",
        "critic.target_modules": "critic.model.target_modules",
        "critic.path": "critic.model.lora_adapter_path",
        "critic.lr": "critic.optim.lr",
        "critic.weight_decay": "critic.optim.weight_decay",
        "critic.value_clip": "critic.cliprange_value",
        "critic.max_grad_norm": "critic.grad_clip",
        "critic.epochs": "critic.ppo_epochs",
    }
    if estimator != "gae":
        idle = ["critic.model.path", "critic.model.tokenizer_path", "critic.ppo_mini_batch_size", *ours.values()]
        values.idle("only algorithm.adv_estimator=gae has a critic", *idle)
        return {}
    _check_critic(values)
    found: Lorl = {lorl: values[key] for lorl, key in ours.items()}
    found["critic.epochs"] = values["critic.ppo_epochs"] or values[f"{_ACTOR}.ppo_epochs"]
    if not values.has("critic.model.lora_rank"):
        values.note("the critic is an adapter of the actor's shape; critic.model.lora_rank sets its rank")
        for lorl in ("critic.rank", "critic.alpha", "critic.target_modules"):
            if not values.has(ours[lorl]):
                del found[lorl]
    if found["critic.path"] is not None:
        found["critic.path"] = expanduser(found["critic.path"])
    return found


def _check_critic(values: Values) -> None:
    if values.has("critic.model.lora_rank") and values["critic.model.lora_rank"] == 0:
        values.fail("critic.model.lora_rank", "0 is full fine-tuning, and lorl's critic is an adapter; use 32, say")
    for key, source in (
        ("critic.model.path", f"{_MODEL}.path"),
        ("critic.model.tokenizer_path", f"{_MODEL}.path"),
        ("critic.ppo_mini_batch_size", f"{_ACTOR}.ppo_mini_batch_size"),
    ):
        if values.has(key) and values[key] not in (None, values[source]):
            values.fail(key, f"the critic is an adapter on the actor's base; it must be {values.spelled(source)}")


GROUPS: tuple[Callable[[Values], Lorl], ...] = (
    of_every_run,
    batch,
    kl,
    clipping,
    optimizer,
    dynamic_sampling,
    reward_weights,
    correction,
    reward,
    critic,
)
