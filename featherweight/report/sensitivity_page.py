"""The page of a sensitivity scan: a bar for every matrix, and what a budget buys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from featherweight.report.plots import FIRST, SECOND, Table, draw_svg, plot_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROW, WIDTH, MARGINS = 18, 900, 60


@dataclass(frozen=True)
class MatrixBar:
    """What rounding one matrix alone costs, as a share of the loss: on the grid, and on the finer one."""

    name: str
    loss: float
    finer_loss: float


def sensitivity_page(grid: str, finer: str, bars: Sequence[MatrixBar], budgets: Sequence[tuple[str, str]]) -> str:
    """budgets: a predicted loss, and which matrices it asks for on the finer grid."""
    text = f"Each matrix rounded alone (blue; on {finer} orange): how far the predictions move, as a share of the loss."
    table = Table(("predicted loss at most", f"matrices on {finer}"), budgets)
    svg = draw_svg(lambda axes: _draw(axes, bars), WIDTH, ROW * len(bars) + MARGINS, "Sensitivity by matrix")
    return plot_page(f"Sensitivity to {grid}", text, svg, table, "What a budget asks for")


def _draw(axes: Axes, bars: Sequence[MatrixBar]) -> None:
    """The first matrix on top."""
    names = [bar.name.removesuffix(".weight") for bar in bars]
    places = range(len(bars))
    axes.barh(places, [bar.finer_loss for bar in bars], color=SECOND, height=0.7, zorder=2)
    drawn = axes.barh(places, [bar.loss for bar in bars], color=FIRST, height=0.7)
    axes.bar_label(drawn, [f"{bar.loss:.2%}" for bar in bars], padding=5)
    axes.set_yticks(list(places), names)
    axes.set_ylim(max(len(bars), 1) - 0.5, -0.5)
    axes.tick_params(left=False)
    axes.xaxis.set_visible(False)
    axes.margins(x=0.1)
