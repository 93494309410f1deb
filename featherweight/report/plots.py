"""Plots that are not the report's own: drawn by matplotlib, as SVG inside a page that opens offline, in light and in dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

from featherweight.report.rendering import render_template

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, GRID, FIRST, SECOND, MARK = "#5b6475", "#e4e7ee", "#2563c9", "#e08a1e", "#c62f2f"
"""Colours on white, each the value of a variable of the page's style, which has another in the dark."""
VARIABLES = {INK: "--ink", GRID: "--grid", FIRST: "--first", SECOND: "--second", MARK: "--mark"}
DPI = 72
"""matplotlib's points are then the pixels of the SVG."""

# The same plot has to be the same bytes, as pages lie in artifacts: names of its parts from a salt, not from chance.
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "featherweight",
    "svg.fonttype": "none",
    "font.size": 11.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
}
_STYLED = Lock()  # matplotlib's settings are those of the whole process


@dataclass(frozen=True)
class Table:
    """Headings, and rows of as many cells."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


def draw_svg(draw: Callable[[Axes], None], width: int, height: int, label: str) -> str:
    """What `draw` draws, as an SVG of `width` by `height` pixels. label: what it shows, for who does not see it."""
    import matplotlib
    from matplotlib.figure import Figure

    drawn = io.StringIO()
    with _STYLED, matplotlib.rc_context(STYLE):
        figure = Figure((width / DPI, height / DPI), DPI, layout="constrained")
        draw(figure.add_subplot())
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(drawn, format="svg", transparent=True, metadata=nothing)
    text = drawn.getvalue()
    text = re.sub("|".join(VARIABLES), lambda found: f"var({VARIABLES[found[0]]})", text[text.index("<svg") :])
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def plot_page(title: str, text: str, svg: str, table: Table | None = None, table_title: str = "") -> str:
    """A page of its own around a plot; all text is escaped."""
    return render_template("plot.html.j2", title=title, text=text, svg=svg, table=table, table_title=table_title)
