"""The report's curves, as plotly figures in plain JSON: {"data": [...], "layout": {...}}.

Colours of text, grid and background are left to the page's style sheet, so that light, dark and print need no script.
"""

import copy
import html
from collections import Counter
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

# After Okabe and Ito's palette, which the colour-blind can tell apart, in tones that read on white and on black.
BLUE, ORANGE, GREEN, PINK, PURPLE, RED, GREY = (
    "#2f86d6",
    "#e08a00",
    "#16a37f",
    "#c76aa5",
    "#8a6fd1",
    "#d9573a",
    "#8b95a1",
)
CYCLE = (BLUE, ORANGE, GREEN, PINK, PURPLE, RED, GREY)


@dataclass(frozen=True, slots=True)
class Chart:
    title: str
    note: str  # what a reader should look for
    figure: dict[str, Any]
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Lines:
    """A chart of metrics against the step: names and their labels."""

    title: str
    note: str
    metrics: tuple[tuple[str, str], ...]
    log: bool = False  # where the values span more than LOG_RATIO


LINES = (
    Lines("KL to the reference", "How far the policy has moved.", (("policy/kl", "KL"),)),
    Lines("Entropy", "Nats a token. A fall to zero is collapse.", (("policy/entropy", "entropy"),)),
    Lines("Response length", "Mean tokens a completion.", (("rollout/response_tokens_mean", "tokens"),)),
    Lines(
        "Truncated and graded",
        "Shares of completions cut off at the limit, and of those that got a reward.",
        (("rollout/truncated_fraction", "truncated"), ("reward/ok_fraction", "graded")),
    ),
    Lines(
        "Mismatch, engine to trainer",
        "Mean |log-probability difference|. A jump means a stale or wrong adapter.",
        (("rollout/mismatch", "mismatch"),),
        log=True,
    ),
    Lines("Clip fraction", "Share of tokens whose ratio was clipped.", (("policy/clip_fraction", "clipped"),)),
    Lines("Gradient norm", "Before clipping.", (("policy/grad_norm", "norm"),)),
    Lines("Loss", "Policy loss; its sign and size say little by themselves.", (("loss/policy", "policy"),)),
    Lines(
        "Value loss",
        "The critic's. Of a reward of 0 or 1, a critic that knows only its mean has half the variance.",
        (("critic/loss", "loss"),),
    ),
    Lines(
        "Explained variance",
        "Of the returns by the critic's values: 1 is perfect, 0 is no better than their mean.",
        (("critic/explained_variance", "explained"),),
    ),
    Lines(
        "Returns and values",
        "Means over tokens; the critic's values should follow.",
        (("critic/returns_mean", "returns"), ("critic/values_mean", "values")),
    ),
    Lines("Critic's gradient norm", "Before clipping.", (("critic/grad_norm", "norm"),)),
    Lines(
        "Rollout correction: divergence",
        "KL of the engine's policy to the trainer's, two estimates. It should stay near zero.",
        (("rollout_corr/kl", "k1"), ("rollout_corr/k3_kl", "k3")),
    ),
    Lines(
        "Rollout correction: perplexity ratio",
        "The trainer's over the engine's; 1 is agreement.",
        (("rollout_corr/ppl_ratio", "ratio"),),
    ),
    Lines(
        "Rollout correction: chi-square",
        "Of tokens and of whole sequences: how heavy the tails of the weights are.",
        (("rollout_corr/chi2_token", "token"), ("rollout_corr/chi2_seq", "sequence")),
        log=True,
    ),
    Lines(
        "Rollout correction: weights",
        "Mean after truncation, largest and smallest before.",
        (
            ("rollout_corr/rollout_is_mean", "mean"),
            ("rollout_corr/rollout_is_max", "largest"),
            ("rollout_corr/rollout_is_min", "smallest"),
        ),
        log=True,
    ),
    Lines(
        "Rollout correction: what still counts",
        "Effective sample size as a share of the tokens, and the share that was rejected.",
        (
            ("rollout_corr/rollout_is_eff_sample_size", "effective"),
            ("rollout_corr/rollout_rs_masked_fraction", "rejected"),
        ),
    ),
    Lines(
        "Throughput",
        "Tokens a second.",
        (("throughput/rollout_tokens_per_s", "rollout"), ("throughput/train_tokens_per_s", "training")),
    ),
    Lines("Memory", "GiB.", (("memory/peak_gib", "device peak"), ("memory/rss_gib", "process"))),
)
LEARNING_RATE = Lines("Learning rate", "", (("policy/lr", "learning rate"),))
LOG_RATIO = 100.0
# Drawn by charts of their own; `reward/STATUS_fraction` is what the chart of failed outcomes counts.
REWARDS_SHOWN = {"reward/mean", "reward/std", "reward/min", "reward/max"}
PHASES = (
    ("time/rollout_s", "rollout"),
    ("time/greedy_s", "greedy rollout"),
    ("time/estimate_s", "advantages"),
    ("time/update_s", "update"),
    ("time/publish_s", "publish"),
)


def charts(rows: list[Row], failures: dict[str, Counter[int]]) -> list[Chart]:
    """All charts that the metrics have data for. `rows` come from `read_metrics`, by step."""
    lines = [_lines_chart(rows, spec) for spec in LINES]
    if len({row["policy/lr"] for row in rows if "policy/lr" in row}) > 1:  # a constant one is among the facts
        lines.append(_lines_chart(rows, LEARNING_RATE))
    drawn = [_reward(rows), _accuracy(rows), *lines, _others(rows), _seconds(rows), _failures(failures)]
    present = [chart for chart in drawn if chart is not None]
    first, last = rows[0]["step"], rows[-1]["step"]
    for chart in present:  # one time axis for all, so that a reader can look down a column
        chart.figure["layout"]["xaxis"]["range"] = [first - 0.6, last + 0.6]
        if last - first < 8:
            chart.figure["layout"]["xaxis"]["dtick"] = 1
    return present


def _reward(rows: list[Row]) -> Chart | None:
    steps, means = _series(rows, "reward/mean")
    if not steps:
        return None
    data = [_line(steps, means, "mean", BLUE)]
    stds: dict[int, Any] = {row["step"]: row.get("reward/std") for row in rows}
    known = [(step, mean, stds[step]) for step, mean in zip(steps, means, strict=True) if mean is not None]
    if all(std is not None for _, _, std in known):
        x = [step for step, _, _ in known]
        edge = {"type": "scatter", "x": x, "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
        fill = {"fill": "tonexty", "fillcolor": "rgba(47, 134, 214, 0.18)", "name": "± 1 std"}
        low, high = [mean - std for _, mean, std in known], [mean + std for _, mean, std in known]
        data = [{**edge, "y": low, "showlegend": False}, {**edge, **fill, "y": high}, *data]
    return Chart("Reward", "Of the training samples.", _figure(data))


def _accuracy(rows: list[Row]) -> Chart | None:
    evaluated = [row for row in rows if row.get("eval/accuracy") is not None]
    if not evaluated:
        return None
    steps = [row["step"] for row in evaluated]
    accuracy = [row["eval/accuracy"] for row in evaluated]
    trace = {**_line(steps, accuracy, "accuracy", GREEN), "mode": "lines+markers"}
    if all(row.get("eval/accuracy_low") is not None and row.get("eval/accuracy_high") is not None for row in evaluated):
        trace["error_y"] = {
            "type": "data",
            "symmetric": False,
            "array": [row["eval/accuracy_high"] - row["eval/accuracy"] for row in evaluated],
            "arrayminus": [row["eval/accuracy"] - row["eval/accuracy_low"] for row in evaluated],
            "thickness": 1.2,
            "width": 4,
        }
    data = [trace]
    if any(row.get("eval/well_formed") is not None for row in evaluated):
        formed = _line(steps, [row.get("eval/well_formed") for row in evaluated], "well-formed", ORANGE)
        data.append({**formed, "mode": "lines+markers", "line": {**formed["line"], "dash": "dot"}})
    figure = _figure(data)
    figure["layout"]["yaxis"]["range"] = [-0.02, 1.02]
    return Chart("Accuracy on held-out problems", "With 95% intervals.", figure)


def _lines_chart(rows: list[Row], spec: Lines) -> Chart | None:
    data = []
    for (metric, label), colour in zip(spec.metrics, CYCLE, strict=False):
        steps, values = _series(rows, metric)
        if steps:
            data.append(_line(steps, values, label, colour))
    if not data:
        return None
    figure = _figure(data)
    values = [value for trace in data for value in trace["y"] if value is not None]
    if spec.log and values and min(values) > 0 and max(values) / min(values) > LOG_RATIO:
        figure["layout"]["yaxis"].update(type="log", rangemode="normal", dtick=1)
    return Chart(spec.title, spec.note, figure)


def _seconds(rows: list[Row]) -> Chart | None:
    timed = [row for row in rows if any(row.get(name) is not None for name, _ in PHASES)]
    if not timed:
        return None
    steps = [row["step"] for row in timed]
    phases = [(name, label) for name, label in PHASES if any(name in row for row in timed)]
    stacks = [[row.get(name) or 0.0 for row in timed] for name, _ in phases]
    data = [_bar(steps, stack, label, colour) for (_, label), stack, colour in zip(phases, stacks, CYCLE, strict=False)]
    rest = [max(0.0, (row.get("time/step_s") or 0.0) - sum(parts)) for row, *parts in zip(timed, *stacks, strict=True)]
    if any(rest):
        data.append(_bar(steps, rest, "other", GREY))
    return Chart("Seconds a step, by phase", "", _figure(data, barmode="stack"), wide=True)


def _failures(failures: dict[str, Counter[int]]) -> Chart | None:
    if not failures:
        return None
    data = []
    for (status, by_step), colour in zip(sorted(failures.items()), CYCLE, strict=False):
        steps = sorted(by_step)
        data.append(_bar(steps, [by_step[step] for step in steps], status, colour))
    note = (
        "Samples that got no reward, by how their grading ended. They are left out of the loss, never counted as zero."
    )
    figure = _figure(data, barmode="stack", showlegend=True)
    if sum(failures.values(), Counter()).most_common(1)[0][1] < 5:
        figure["layout"]["yaxis"]["dtick"] = 1  # counts have no halves
    return Chart("Outcomes that are not ok", note, figure, wide=True)


def _others(rows: list[Row]) -> Chart | None:
    """What a reward function of the user returned besides the reward, and whatever else was logged under reward/."""
    logged = {name for row in rows for name in row if name.startswith("reward/") and not name.endswith("_fraction")}
    names = sorted(logged - REWARDS_SHOWN)[: len(CYCLE)]
    data = []
    for name, colour in zip(names, CYCLE, strict=False):
        steps, values = _series(rows, name)
        if steps and any(value is not None for value in values):
            data.append(_line(steps, values, html.escape(name.removeprefix("reward/")), colour))
    if not data:
        return None
    return Chart("Other rewards", "Whatever else was logged under reward/.", _figure(data, showlegend=True), wide=True)


def _series(rows: list[Row], name: str) -> tuple[list[int], list[float | None]]:
    """Steps that logged the metric, and its values; None (a gap) where the value was not finite."""
    logged = [row for row in rows if name in row and isinstance(row[name], int | float | None)]
    return [row["step"] for row in logged], [row[name] for row in logged]


def _line(steps: list[int], values: list[float | None], label: str, colour: str) -> dict[str, Any]:
    few = len(steps) < 25
    return {
        "type": "scatter",
        "x": steps,
        "y": values,
        "name": label,
        "mode": "lines+markers" if few else "lines",
        "marker": {"size": 5, "color": colour},
        "line": {"width": 2, "color": colour},
        "hovertemplate": "%{y:.4g}<extra>" + label + "</extra>",
    }


def _bar(steps: list[int], values: list[float], label: str, colour: str) -> dict[str, Any]:
    hover = "%{y:.3g}<extra>" + label + "</extra>"
    return {"type": "bar", "x": steps, "y": values, "name": label, "marker": {"color": colour}, "hovertemplate": hover}


_LAYOUT: dict[str, Any] = {
    "height": 230,
    "margin": {"l": 52, "r": 12, "t": 8, "b": 34},
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "font": {"family": "system-ui, sans-serif", "size": 12},
    "hovermode": "x unified",
    "xaxis": {"title": {"text": "step", "standoff": 4}, "zeroline": False, "showgrid": False, "tickformat": "d"},
    "yaxis": {"automargin": True, "zeroline": False, "nticks": 5, "exponentformat": "power", "rangemode": "tozero"},
    "legend": {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
    "bargap": 0.15,
}


def _figure(data: list[dict[str, Any]], **layout: Any) -> dict[str, Any]:
    full: dict[str, Any] = copy.deepcopy(_LAYOUT) | {"showlegend": len(data) > 1} | layout
    if full["showlegend"]:
        full["margin"]["t"] = 30
    return {"data": data, "layout": full}
