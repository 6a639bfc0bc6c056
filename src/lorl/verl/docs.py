"""docs/from-verl.md, written from the table: `python -m lorl.verl` prints it, `python -m lorl.verl FILE` writes it."""

from itertools import groupby

from lorl import schema
from lorl.verl.rows import Row
from lorl.verl.table import TABLE

_INTRODUCTION = """\
# Coming from verl

<!-- Written by `python -m lorl.verl docs/from-verl.md` from the table in src/lorl/verl; edit that. -->

Put `lorl.main_ppo` where your script has `verl.trainer.main_ppo`; every `key=value` stays as it is, Hydra's quoting,
lists, `+key`, `++key`, `~key`, `null` and `${other.key}` included:

    python -m lorl.main_ppo algorithm.adv_estimator=grpo actor_rollout_ref.model.lora_rank=32 ...

- `--print-config` prints the run in lorl's own YAML and ends. `lorl train run.yaml` takes it from there.
- What your command line leaves out has verl's default, not lorl's: a learning rate of 1e-6 without
  `actor_rollout_ref.actor.optim.lr`, 8 GPUs without `trainer.n_gpus_per_node`. The few exceptions say "lorl's own".
- An unknown key, a wrong value or a contradiction ends the run at once, with one sentence and exit code 2.
- A key without meaning here is named in the log, with the reason. Nothing is swallowed.
- Spellings of January 2026 and of 0.9.1 are both taken. `+lorl.KEY=value` sets a key of lorl's that verl has not, such
  as `+lorl.algorithm.reference=base`.

What differs on purpose: the loss is normalised by the global batch, so it does not depend on micro-batches; with
`lora_adapter_path` the rank comes from the adapter and the KL's reference is the adapter that training started from;
`custom_reward_function.path` works under both of its names; a checkpoint is an adapter of a few megabytes that peft and
vLLM load, at any number of GPUs; the critic is a second adapter on the same base.
"""

_TITLES = {
    "data": "Data",
    "algorithm": "Algorithm",
    "reward": "Reward",
    "model": "Model and adapter",
    "actor": "Actor",
    "ref": "Reference",
    "rollout": "Rollout",
    "critic": "Critic",
    "trainer": "Trainer and the rest",
}


def markdown() -> str:
    """The whole page."""
    parts = [_INTRODUCTION]
    rows = sorted(TABLE, key=lambda row: list(_TITLES).index(_room(row)))
    for room, group in groupby(rows, key=_room):
        parts.append(f"\n## {_TITLES[room]}\n\n| verl | its default | lorl | |\n|---|---|---|---|\n")
        parts += [_line(row) for row in group]
    return "".join(parts)


def _room(row: Row) -> str:
    first, *rest = row.key.split(".")
    if first == "actor_rollout_ref":
        return rest[0] if rest[0] in _TITLES else "actor"
    if first.startswith("reward"):
        return "reward"
    return first if first in _TITLES else "trainer"


def _line(row: Row) -> str:
    names = "<br>".join(f"`{name}`" for name in (row.key, *row.spellings))
    default = f"`{schema.shown(row.default)}`"
    if row.sets:
        effect = ", ".join(f"`{key}`" for key in row.sets)
    elif row.joint:
        effect = "checked"
    else:
        effect = "refused" if row.refused else "without effect"
    if row.refused and row.off:
        effect += " unless " + " or ".join(f"`{schema.shown(value)}`" for value in row.off)
    why = "; ".join(part for part in (row.why, "not given: lorl's own default" if row.only_given else "") if part)
    return f"| {names} | {default} | {effect} | {_cell(why)} |\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
