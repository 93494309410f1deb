"""The page that shows how a training run went astray: its loss curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from featherweight.report.plots import FIRST, MARK, draw_svg, plot_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDE_SPAN = 20
"""A curve that spans a larger factor is drawn on a logarithmic axis."""

FEW = 50
"""Fewer steps than this have a point each: a single one is no line."""


def loss_page(losses: Sequence[float], title: str) -> str:
    """A page of its own with the loss of every step, one value a step, in nats per token; the last step is marked."""
    return plot_page("Loss curve", title, loss_curve(losses))


def loss_curve(losses: Sequence[float]) -> str:
    """The curve as SVG; steps whose loss is no finite number are gaps in it."""
    return draw_svg(lambda axes: _draw(axes, losses), 760, 360, f"Loss of {len(losses)} steps")


def _draw(axes: Axes, losses: Sequence[float]) -> None:
    finite = [loss for loss in losses if math.isfinite(loss)]
    if finite and min(finite) > 0 and max(finite) / min(finite) > WIDE_SPAN:
        axes.set_yscale("log")
    shown = [loss if math.isfinite(loss) else math.nan for loss in losses]
    axes.plot(
        range(1, len(losses) + 1),
        shown,
        color=FIRST,
        linewidth=1.5,
        gid="curve",
        marker="o",
        markersize=2 if len(losses) < 50 else 0,
    )
    axes.set(xlabel="step", ylabel="loss, nats per token")
    axes.grid(axis="y")
    if losses:
        _mark_end(axes, len(losses), losses[-1])


def _mark_end(axes: Axes, step: int, loss: float) -> None:
    """Where it ended, and at what."""
    axes.axvline(step, color=MARK, linestyle="--", linewidth=1)
    axes.annotate(
        f"step {step}: {loss:.4g}",
        (step, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-5, -3),
        textcoords="offset points",
        ha="right",
        va="top",
        color=MARK,
    )
