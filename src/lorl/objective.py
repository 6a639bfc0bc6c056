"""What the configuration says about the objective, looked up once: names become functions, presets become values."""

from dataclasses import dataclass, replace
from typing import Any

from lorl.algorithms.catalogue import get_advantage, get_kl, get_policy_loss
from lorl.algorithms.correction import PRESETS, Correction, get_preset, parse_rejections
from lorl.algorithms.registry import AdvantageEntry, KLEntry, PolicyLossEntry
from lorl.config import CorrectionConfig, RunConfig
from lorl.errors import UserError
from lorl.user_code import import_algorithms


@dataclass(frozen=True, slots=True)
class Objective:
    """The functions of a run's objective, and the settings that they read."""

    advantage: AdvantageEntry
    loss: PolicyLossEntry
    kl: KLEntry
    correction: Correction | None  # None: neither measured nor corrected
    settings: dict[str, Any]
    kl_in_loss: bool
    kl_in_reward: bool
    needs_old_logprobs: bool  # of a pass at the step's start; a single on-policy update makes them in its own

    @classmethod
    def of(cls, config: RunConfig) -> "Objective":
        """Raises UserError for a name that there is not, and for settings that contradict each other."""
        algorithm = config.algorithm
        if algorithm.path is not None:
            import_algorithms(algorithm.path)
        if algorithm.kl_estimator == "full+":
            raise UserError("algorithm.kl_estimator=full+: full has the exact gradient already; use full")
        advantage, kl = get_advantage(algorithm.advantage), get_kl(algorithm.kl_estimator)
        correction = correction_of(config.correction)
        loss = _loss_of(config, correction)
        bypass = correction is not None and correction.bypass
        kl_in_reward = algorithm.kl_coef > 0 and algorithm.kl_in == "reward"
        updates = algorithm.epochs * (
            config.data.prompts_per_step // (algorithm.minibatch_prompts or config.data.prompts_per_step)
        )
        dropout = config.adapter.dropout > 0  # without it a single update is exactly on-policy
        sampled_kl = kl_in_reward and not kl.needs_logits
        reads_old = updates > 1 or sampled_kl or dropout or loss.prepare is not None or correction is not None
        if bypass and dropout:
            raise UserError(
                f"adapter.dropout={config.adapter.dropout} with correction.bypass would enter the ratio between the "
                "engine's log-probabilities and the trainer's; use a dropout of 0, or correction.bypass=false"
            )
        return cls(
            advantage=advantage,
            loss=loss,
            kl=kl,
            correction=correction,
            settings=algorithm.model_dump(),
            kl_in_loss=algorithm.kl_coef > 0 and algorithm.kl_in == "loss",
            kl_in_reward=kl_in_reward,
            needs_old_logprobs=reads_old and not bypass,
        )

    @property
    def bypass(self) -> bool:
        return self.correction is not None and self.correction.bypass

    @property
    def needs_critic(self) -> bool:
        return "values" in self.advantage.needs

    @property
    def corrects_each_minibatch(self) -> bool:
        """With bypass, weights and tests compare the engine with the policy as it is at each minibatch."""
        correction = self.correction
        return correction is not None and correction.bypass and bool(correction.importance or correction.rejections)


def correction_of(config: CorrectionConfig) -> Correction | None:
    """The preset with what refines it; None where nothing is asked for. Raises UserError."""
    correction = get_preset(config.preset)
    if config.reject:
        correction = replace(correction, rejections=tuple(r for text in config.reject for r in _rejection(text)))
    given = {name: getattr(config, name) for name in ("importance", "upper", "lower", "bypass", "bypass_loss")}
    correction = replace(
        correction, normalize=config.normalize, **{name: value for name, value in given.items() if value is not None}
    )
    if correction.importance is None:
        for name in ("upper", "lower", "normalize"):
            if getattr(config, name):
                raise UserError(
                    f"correction.{name} is about importance weights, and there are none; set correction.importance to "
                    "token or sequence"
                )
    if correction.lower is not None and correction.lower > correction.upper:
        raise UserError(f"correction.lower={correction.lower} is above correction.upper={correction.upper}")
    if config.bypass_loss is not None and not correction.bypass:
        raise UserError("correction.bypass_loss acts with correction.bypass=true only; set that, or leave it out")
    if correction.bypass and correction.bypass_loss == "ppo_clip" and correction.importance is not None:
        raise UserError(
            f"correction.importance={correction.importance} with correction.bypass=true would correct twice: the "
            "ratio of the clipped loss is the correction already; leave it out, or set correction.bypass_loss=reinforce"
        )
    return None if correction == PRESETS["disabled"] else correction


def _rejection(text: str) -> Any:
    mode, colon, bounds = text.partition(":")
    if not colon:
        raise UserError(f"correction.reject={text!r}: expected a test and its bound, such as seq_mean_k1:0.999_1.001")
    return parse_rejections(mode, bounds, "correction.reject")


def _loss_of(config: RunConfig, correction: Correction | None) -> PolicyLossEntry:
    """The policy loss; REINFORCE where rollout correction replaces it."""
    loss = get_policy_loss(config.algorithm.policy_loss)
    if correction is None or not correction.bypass:
        return loss
    if correction.bypass_loss == "reinforce":
        if loss.name not in ("ppo_clip", "reinforce"):
            raise UserError(
                f"correction.bypass_loss=reinforce replaces algorithm.policy_loss={loss.name}; leave one of them out"
            )
        return get_policy_loss("reinforce")
    if config.correction.bypass_loss is not None and loss.name != "ppo_clip":
        raise UserError(f"correction.bypass_loss=ppo_clip contradicts algorithm.policy_loss={loss.name}; leave one out")
    return loss
