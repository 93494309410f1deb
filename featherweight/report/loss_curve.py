"""The page that shows how a training run went astray: its loss curve, as SVG text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from html import escape

WIDTH, HEIGHT = 760, 360
LEFT, TOP, RIGHT, BOTTOM = 64, 16, WIDTH - 16, HEIGHT - 44
POINTS = 2000
"""More points than this are thinned to the highest of each stretch: a peak is what one looks for."""

_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; max-width: 780px; margin: 2rem auto; color: #1d2433; background: #fff; }
text { font-size: 11.5px; fill: #5b6475; } .grid { stroke: #e4e7ee; } .curve { fill: none; stroke: #2563c9; stroke-width: 1.5; }
.end { stroke: #c62f2f; stroke-dasharray: 4 3; } .end-name { fill: #c62f2f; font-weight: 600; }
@media (prefers-color-scheme: dark) {
  body { color: #e6e9f0; background: #14171f; } .grid { stroke: #2b303c; } text { fill: #9aa3b5; } .curve { stroke: #6fa3ff; }
}
"""


def loss_page(losses: Sequence[float], title: str) -> str:
    """A page of its own with the loss of every step, one value a step, in nats per token; the last step is marked."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Loss curve</title>'
        f"<style>{_STYLE}</style></head><body><h1>Loss curve</h1><p>{escape(title)}</p>{loss_curve(losses)}</body></html>\n"
    )


def loss_curve(losses: Sequence[float]) -> str:
    """The curve as SVG: steps across, loss upwards (logarithmic once it spans more than a factor of 20)."""
    finite = [(step, loss) for step, loss in enumerate(losses, 1) if math.isfinite(loss)]
    label = f"Loss of {len(losses)} steps"
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{label}">']
    values = [loss for _, loss in finite] or [0.0, 1.0]
    bent: Callable[[float], float] = math.log if min(values) > 0 and max(values) / min(values) > 20 else float
    low, high = bent(min(values)), bent(max(values))
    margin = (high - low) * 0.05 or 0.5
    low, high = low - margin, high + margin

    def spot(step: float, loss: float) -> tuple[float, float]:
        across = LEFT + (step - 1) / max(1, len(losses) - 1) * (RIGHT - LEFT)
        return across, BOTTOM - (bent(loss) - low) / (high - low) * (BOTTOM - TOP)

    parts += _ticks(values, len(losses), spot)
    if finite:
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in itertools.starmap(spot, _thinned(finite)))
        parts.append(f'<polyline class="curve" points="{points}"/>')
    parts += _end(losses, spot(len(losses), values[-1])[0])
    return "\n".join([*parts, "</svg>"])


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    size = -(-len(points) // POINTS)
    return [max(points[start : start + size], key=lambda point: point[1]) for start in range(0, len(points), max(1, size))]


def _ticks(values: list[float], steps: int, spot: Callable[[float, float], tuple[float, float]]) -> Iterator[str]:
    """Four losses and up to five steps."""
    for share in (0, 1 / 3, 2 / 3, 1):
        loss = min(values) + share * (max(values) - min(values))
        y = spot(1, loss)[1]
        yield f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{loss:.4g}</text>'
    for step in sorted({1 + round(share * (steps - 1)) for share in (0, 0.25, 0.5, 0.75, 1)} - ({steps} if steps > 1 else set())):
        yield f'<text x="{spot(step, values[0])[0]:.1f}" y="{BOTTOM + 16}" text-anchor="middle">{step}</text>'
    yield f'<text x="{(LEFT + RIGHT) / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">step</text>'
    yield f'<text transform="translate(12 {(TOP + BOTTOM) / 2:.0f}) rotate(-90)" text-anchor="middle">loss, nats per token</text>'


def _end(losses: Sequence[float], x: float) -> Iterator[str]:
    """Where it ended, and at what."""
    if not losses:
        return
    yield f'<line class="end" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{BOTTOM}"/>'
    yield (
        f'<text class="end-name" x="{x - 5 if x > LEFT + 120 else x + 5:.1f}" y="{TOP + 12}" '
        f'text-anchor="{"end" if x > LEFT + 120 else "start"}">step {len(losses)}: {losses[-1]:.4g}</text>'
    )
