"""Small charts as SVG text: panels of lines against the step, readable on white and on black."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil

GREY = "#7d8590"
FONT = "font-family='system-ui, sans-serif'"


@dataclass(frozen=True, slots=True)
class Line:
    xs: Sequence[float]
    ys: Sequence[float]
    colour: str
    width: float = 1.6
    marks: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    lines: Sequence[Line]


def grid(
    panels: Sequence[Panel],
    *,
    columns: int,
    size: tuple[int, int],
    last_step: int,
    font: int,
    legend: Sequence[tuple[str, str]] = (),
) -> str:
    """All panels share their axes: steps 0 to `last_step`, values 0 to 1. `legend`: (label, colour)."""
    width, height = size
    top = 2 * font if legend else 0
    rows = ceil(len(panels) / columns)
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {columns * width} {rows * height + top}' "
        f"width='{columns * width}' {FONT} font-size='{font}'>"
    ]
    x = 3 * font
    for label, colour in legend:
        parts.append(f"<path d='M{x} {font}h{2 * font}' stroke='{colour}' stroke-width='2.4'/>")
        parts.append(_text(x + 2.4 * font, 1.35 * font, label))
        x += int((3.5 + 0.6 * len(label)) * font)
    for index, panel in enumerate(panels):
        left, upper = index % columns * width, index // columns * height + top
        parts.append(f"<g transform='translate({left} {upper})'>{_panel(panel, size, last_step, font)}</g>")
    return "\n".join([*parts, "</svg>\n"])


def _panel(panel: Panel, size: tuple[int, int], last_step: int, font: int) -> str:
    left, right, upper, lower = 2.4 * font, size[0] - font, 2 * font, size[1] - 1.9 * font

    def at(x: float, y: float) -> str:
        return f"{left + x / last_step * (right - left):.1f} {lower - y * (lower - upper):.1f}"

    parts = [_text(left, 1.3 * font, panel.title, weight="600")]
    for value in (0, 0.5, 1):
        parts.append(f"<path d='M{at(0, value)}L{at(last_step, value)}' stroke='{GREY}' stroke-opacity='.3'/>")
        parts.append(
            _text(left - 0.4 * font, lower - value * (lower - upper) + 0.35 * font, f"{value:g}", anchor="end")
        )
    for step in (0, last_step // 2, last_step):
        x = left + step / last_step * (right - left)
        parts.append(_text(x, lower + 1.2 * font, str(step), anchor="middle"))
    for line in panel.lines:
        points = [at(x, y) for x, y in zip(line.xs, line.ys, strict=True)]
        parts.append(
            f"<path d='M{'L'.join(points)}' fill='none' stroke='{line.colour}' stroke-width='{line.width}' "
            "stroke-linejoin='round'/>"
        )
        if line.marks:
            dots = (point.split() for point in points)
            parts += [f"<circle cx='{x}' cy='{y}' r='{1.6 * line.width}' fill='{line.colour}'/>" for x, y in dots]
    return "".join(parts)


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "400") -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' fill='{GREY}' text-anchor='{anchor}' font-weight='{weight}'>"
        f"{escape(text)}</text>"
    )
