"""The run report: one HTML file without any network access, made from a run folder, finished or not.

What a model wrote is hostile input here. The template escapes every value, the figures' JSON holds no "<", and
the page's content security policy runs no script but the two of its own and loads nothing from anywhere.
"""

import importlib.resources
import json
import secrets
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml

from lorl.errors import UserError
from lorl.tracking.charts import Row, charts
from lorl.tracking.console import printable
from lorl.tracking.jsonl import METRICS_FILE, read_metrics
from lorl.tracking.rollouts import read_rollouts

TEXT_SHOWN = 3000  # characters of a prompt or completion


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One side of the before/after box; shares in [0, 1]."""

    label: str
    accuracy: float
    low: float | None
    high: float | None
    n: int | None
    well_formed: float | None


def write_report(run_folder: Path, output: Path | None = None) -> Path:
    """Write the report of a run, by default to RUN/report.html, and return where it is.

    Args:
        run_folder: needs metrics.jsonl with at least one line; all other files are shown where they exist.
        output: the HTML file to write; its folder is made.

    Raises:
        UserError: no run there, nothing logged yet, the output can't be written, or plotly is not installed.
    """
    plotly_js = _plotly_js()
    if not run_folder.is_dir():
        raise UserError(f"no run folder at {run_folder}; pass the folder that holds the run's {METRICS_FILE}")
    rows = read_metrics(run_folder)
    if not rows:
        raise UserError(f"{run_folder / METRICS_FILE} holds no step yet; is this a run folder, and has it started?")
    output = run_folder / "report.html" if output is None else output
    page = _render(run_folder, rows, plotly_js)
    beside = output.with_name(output.name + ".tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(page, encoding="utf-8", errors="replace")  # lone surrogates have no UTF-8
        beside.replace(output)
    except OSError as error:
        raise UserError(f"cannot write the report to {output}: {error.strerror}; choose another place") from error
    return output


def _render(run_folder: Path, rows: list[Row], plotly_js: str) -> str:
    import jinja2

    config_text = _read_text(run_folder / "config.yaml")
    config = _mapping(yaml.safe_load, config_text)
    summary = _mapping(json.loads, _read_text(run_folder / "summary.json"))
    environment = _mapping(json.loads, _read_text(run_folder / "environment.json"))
    rollouts = read_rollouts(run_folder)
    drawn = charts(rows, rollouts.failures)
    before, after = _evaluations(summary, rows)

    page = importlib.resources.files("lorl.tracking") / "report_page"
    template = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template.filters |= {"percent": _percent, "shorten": _shorten, "number": _number}
    return template.from_string((page / "report.html").read_text(encoding="utf-8")).render(
        name=summary.get("run") or run_folder.resolve().name,
        status=_status(summary, rows, config),
        facts=_facts(config, summary, environment, rows),
        before=before,
        after=after,
        charts=drawn,
        cards=rollouts.cards,
        samples=rollouts.samples,
        failures={status: sum(by_step.values()) for status, by_step in sorted(rollouts.failures.items())},
        config_text=config_text,
        environment_text=json.dumps(environment, indent=2, ensure_ascii=False) if environment else "",
        style=(page / "report.css").read_text(encoding="utf-8"),
        script=(page / "report.js").read_text(encoding="utf-8"),
        plotly_js=plotly_js,
        # Inside a script element only "<" could end the element or open a comment.
        figures=json.dumps([chart.figure for chart in drawn], allow_nan=False).replace("<", "\\u003c"),
        nonce=secrets.token_urlsafe(16),
    )


def _plotly_js() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise UserError("the report needs plotly, which is not installed: pip install 'lorl[report]'") from error
    return get_plotlyjs()


def _evaluations(summary: Row, rows: list[Row]) -> tuple[Evaluation | None, Evaluation | None]:
    """Before and after from the summary, or from the metrics as long as there is none (None: not evaluated yet)."""
    sides: dict[str, Evaluation] = {}
    for key in ("before", "after"):
        side = summary.get(key)
        if isinstance(side, dict) and side.get("accuracy") is not None:
            rest = (side.get(name) for name in ("low", "high", "n", "well_formed"))
            sides[key] = Evaluation(key.capitalize(), side["accuracy"], *rest)
    evaluated = [row for row in rows if row.get("eval/accuracy") is not None]
    if evaluated and "before" not in sides and evaluated[0]["step"] == 0:
        sides["before"] = _evaluation("Before", evaluated[0])
    if evaluated and "after" not in sides and evaluated[-1]["step"] > 0:
        sides["after"] = _evaluation(f"Step {evaluated[-1]['step']}", evaluated[-1])
    return sides.get("before"), sides.get("after")


def _evaluation(label: str, row: Row) -> Evaluation:
    names = ("eval/accuracy_low", "eval/accuracy_high", "eval/n", "eval/well_formed")
    return Evaluation(label, row["eval/accuracy"], *(row.get(name) for name in names))


def _status(summary: Row, rows: list[Row], config: Row) -> str:
    last = rows[-1]["step"]
    if summary:
        return f"finished after {summary.get('steps', last)} steps"
    total = _section(config, "trainer").get("total_steps")
    return f"unfinished: step {last}" + (f" of {total}" if total else "")


def _facts(config: Row, summary: Row, environment: Row, rows: list[Row]) -> list[tuple[str, str]]:
    """What was run, as (term, description); terms whose sources are missing are left out."""
    adapter, algorithm = _section(config, "adapter"), _section(config, "algorithm")
    rollout, optim, data = _section(config, "rollout"), _section(config, "optim"), _section(config, "data")
    reward = _section(config, "reward")
    seconds = summary.get("seconds") or sum(row.get("time/step_s") or 0.0 for row in rows)
    facts = [
        ("Model", summary.get("model") or _section(config, "model").get("path")),
        ("Adapter", _join("rank {rank}, alpha {alpha:g}, {target_modules}", adapter)),
        ("Algorithm", _join("{advantage}, {policy_loss}, KL {kl_coef:g} in the {kl_in}", algorithm)),
        ("Batch", _join("{prompts_per_step} prompts × {n} samples, temperature {temperature:g}", {**data, **rollout})),
        ("Optimizer", _join("AdamW, learning rate {lr:g}, {schedule}", optim)),
        ("Task", _listed(data.get("train"))),
        ("Reward", reward.get("path") or reward.get("name")),
        ("Seed", config.get("seed")),
        ("Time", str(timedelta(seconds=round(seconds))) if seconds else None),
        ("Tokens", _join("{rollout_tokens:,} sampled, {trained_tokens:,} trained", summary)),
        ("Machine", environment.get("machine")),
    ]
    return [(term, str(description)) for term, description in facts if description not in (None, "")]


def _join(template: str, values: Row) -> str | None:
    try:
        return template.format(**values)
    except (KeyError, ValueError, TypeError):  # an older or foreign run folder
        return None


def _listed(value: str | list[str] | None) -> str | None:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _section(config: Row, name: str) -> Row:
    section = config.get(name)
    return section if isinstance(section, dict) else {}


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _mapping(parse: Any, text: str) -> Row:
    """A parsed file that should hold a mapping; what is absent or torn counts as empty."""
    try:
        value = parse(text) if text else {}
    except (ValueError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}%"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _shorten(text: object) -> str:
    whole = printable(str(text))
    if len(whole) <= TEXT_SHOWN:
        return whole
    return f"{whole[:TEXT_SHOWN]}\n[… {len(whole) - TEXT_SHOWN:,} characters more]"
