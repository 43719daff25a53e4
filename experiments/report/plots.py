"""Plots of the report as inline SVG: no script, no external file, and colors set by the page's style sheet.

matplotlib draws with placeholder colors; they become CSS variables, so that one drawing works on a light or dark
screen and on paper.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SERIES = 7  # colors of the style sheet; beyond them the line style changes
_DASHES: tuple[str | tuple[int, tuple[float, ...]], ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_INK, _FAINT = "#0a0001", "#0a0002"  # text and axes; grid
_RC: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: selectable, searchable, in the page's font
    "font.size": 9.5,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0,
    "xtick.major.pad": 5,
    "ytick.major.size": 0,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "path.simplify": True,
}


@dataclass(frozen=True)
class Line:
    """One curve with an optional band."""

    label: str
    series: int  # which color and line style
    x: Array
    y: Array
    low: Array | None = None
    high: Array | None = None


def panel(name: str, lines: Sequence[Line], *, x_label: str, unit: bool = False, description: str) -> str:
    """A small plot as an <svg> element. `name` is unique in the page, `unit` makes y range from 0 to 1."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    with mpl.rc_context({**_RC, "svg.hashsalt": name}):
        figure = Figure(figsize=(4.4, 2.5))
        FigureCanvasSVG(figure)
        axis = figure.add_axes((0.125, 0.185, 0.855, 0.785))
        for line in lines:
            if line.low is not None and line.high is not None:
                axis.fill_between(line.x, line.low, line.high, color=_placeholder(line.series), alpha=0.16, linewidth=0)
            style = _DASHES[line.series // SERIES % len(_DASHES)]
            axis.plot(line.x, line.y, color=_placeholder(line.series), linewidth=1.6, linestyle=style)
        axis.grid(axis="y")
        axis.margins(x=0.0)
        if unit:
            axis.set_ylim(0.0, 1.02)
        axis.spines["left"].set_visible(False)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.yaxis.set_major_locator(MaxNLocator(5))
        if lines and max(float(line.x[-1]) for line in lines) >= 10_000:
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.set_xlabel(x_label)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), name, description)


def strip(
    scores: Sequence[float],
    center: float,
    interval: tuple[float, float] | None,
    low: float,
    high: float,
    series: int,
    mark: float | None = None,
) -> str:
    """Every score as a tick, the interval as a bar and its center as a dot, from `low` to `high`.

    `mark` is a value to compare with by eye. No text alternative: the numbers are next to it.
    """
    width, span = 132.0, (high - low) or 1.0

    def x(value: float) -> float:
        return round(4.0 + (width - 8.0) * min(max((value - low) / span, 0.0), 1.0), 1)

    color = f"var(--series-{series % SERIES})"
    parts = [f'<path class="base" d="M4 9H{width - 4:g}"/>']
    if mark is not None:
        parts.append(f'<path class="mark" d="M{x(mark)} 1v16"/>')
    if interval is not None:
        parts.append(f'<path class="bar" stroke="{color}" d="M{x(interval[0])} 9H{x(interval[1])}"/>')
    ticks = "".join(f"M{x(score)} 5.5v7" for score in scores)
    parts.append(f'<path class="ticks" stroke="{color}" d="{ticks}"/>')
    parts.append(f'<circle fill="{color}" cx="{x(center)}" cy="9" r="3.4"/>')
    return f'<svg class="strip" viewBox="0 0 {width:g} 18" aria-hidden="true">{"".join(parts)}</svg>'


def swatch(series: int) -> str:
    """The line style of a series, for legends and tables."""
    dashes = ("", "7 3", "2 2", "8 3 2 3")[series // SERIES % len(_DASHES)]
    dash = f' stroke-dasharray="{dashes}"' if dashes else ""
    return (
        '<svg class="swatch" viewBox="0 0 22 10" aria-hidden="true">'
        f'<path d="M1 5H21" stroke="var(--series-{series % SERIES})"{dash}/></svg>'
    )


def _placeholder(series: int) -> str:
    return f"#0b00{series % SERIES:02x}"


def _inline(svg: str, name: str, description: str) -> str:
    """Make matplotlib's SVG fit for a page: no prolog, no needless ids, the page's colors, a text alternative."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: found.group(0) if found.group(1) in used else "", svg)
    svg = svg.replace(_INK, "var(--plot-ink)").replace(_FAINT, "var(--plot-grid)")
    svg = re.sub(r"#0b00(0[0-9a-f])", lambda found: f"var(--series-{int(found.group(1), 16)})", svg)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)  # use the page's own
    svg = re.sub(r' (?:d|x|y)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found.group()), svg)  # points
    box = re.search(r'viewBox="[^"]+"', svg)
    assert box is not None
    title = f'<title id="{name}-title">{escape(description)}</title>'
    opening = f'<svg class="plot" {box.group(0)} role="img" aria-labelledby="{name}-title">{title}'
    body = re.sub(r"\s*\n\s*", " ", svg[svg.index(">") + 1 :])
    return opening + body.replace("xlink:href", "href").strip()
