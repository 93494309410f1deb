"""The picture of quality against speed, as SVG text: no script and no library is needed to show it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from featherweight.measure.figures import mebibytes, percent, rate, times
from featherweight.report.result import OptimizationResult, VariantRow, ranked

FONT = 11.5
_GLYPH = 0.56 * FONT
_SPEED_TICKS = (
    [2.0**power for power in range(-8, 12)],
    [base * 2.0**power for power in range(-8, 12) for base in (1, 1.5)],
    [1 + step / 10 for step in range(-9, 31)],
    [1 + step / 50 for step in range(-49, 51)],
)
_LOSS_TICKS = (0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 50, 100)


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: Box) -> bool:
        """Whether the two share any area."""
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom

    def inside(self, other: Box) -> bool:
        """Whether this one lies within the other."""
        across = other.left <= self.left and self.right <= other.right
        return across and other.top <= self.top and self.bottom <= other.bottom


@dataclass(frozen=True)
class Label:
    """A text beside a point; `anchor` is where the leader line meets it, None where the text is close enough."""

    text: str
    box: Box
    anchor: tuple[float, float] | None = None


@dataclass(frozen=True)
class Scale:
    """Speed (logarithmic, right is faster) and quality change (better is up) to pixels.

    The quality axis is linear up to about `knee` and logarithmic beyond, so that 0.1 % and 100 % can stand in one picture.
    """

    plot: Box
    speeds: tuple[float, float]
    losses: tuple[float, float]
    knee: float

    @classmethod
    def over(cls, plot: Box, speeds: Sequence[float], losses: Sequence[float]) -> Scale:
        """Room for these values and a margin."""
        knee = min(0.01, max(0.0005, max(abs(loss) for loss in losses) / 4))
        bent = [math.asinh(loss / knee) for loss in losses]
        margin = max((max(bent) - min(bent)) * 0.08, 0.2)
        spread = max((max(speeds) / min(speeds)) ** 0.08, 1.04)
        low, high = min(bent) - margin, max(bent) + margin
        return cls(plot, (min(speeds) / spread, max(speeds) * spread), (math.sinh(low) * knee, math.sinh(high) * knee), knee)

    def x(self, speed: float) -> float:
        """Pixels from the left, held inside the plot."""
        low, high = (math.log(value) for value in self.speeds)
        share = (math.log(max(speed, 1e-9)) - low) / (high - low)
        return self.plot.left + min(max(share, 0.0), 1.0) * (self.plot.right - self.plot.left)

    def y(self, loss: float) -> float:
        """Pixels from the top, held inside the plot."""
        low, high = (math.asinh(value / self.knee) for value in self.losses)
        share = (math.asinh(loss / self.knee) - low) / (high - low)
        return self.plot.top + min(max(share, 0.0), 1.0) * (self.plot.bottom - self.plot.top)

    def speed_ticks(self) -> list[float]:
        """A few round ratios inside the range."""
        found: list[float] = []
        for candidates in _SPEED_TICKS:
            found = [value for value in candidates if self.speeds[0] <= value <= self.speeds[1]]
            if len(found) >= 3:
                break
        return _apart(found, self.x, 44)

    def loss_ticks(self) -> list[float]:
        """Round percentages inside the range, 0 first of all."""
        values = [sign * tick for tick in _LOSS_TICKS for sign in (1, -1) if tick or sign > 0]
        return _apart([value for value in values if self.losses[0] <= value <= self.losses[1]], self.y, 24)


def _apart(values: Iterable[float], place: Callable[[float], float], gap: float) -> list[float]:
    """Those of the values that stand at least `gap` pixels from every earlier one."""
    kept: list[float] = []
    for value in values:
        if all(abs(place(value) - place(other)) >= gap for other in kept):
            kept.append(value)
    return kept


def chart_points(result: OptimizationResult, batch: int) -> list[VariantRow]:
    """Rows that have both a speed at that batch size and a quality."""
    rows = ranked(result)
    return [row for row in rows if math.isfinite(row.get(f"speedup_{batch}")) and math.isfinite(row.get("quality_change"))]


def pareto_chart(result: OptimizationResult, batch: int, width: int, height: int, full_names: bool = True) -> str:
    """The chart of quality against speed. Where `full_names` is off, or a name finds no room, its number in the table stands."""
    rows = chart_points(result, batch)
    if not rows:
        return ""
    plot = Box(72, 14, width - 14, height - 44)
    constraints = _constraints(result, batch)
    scale = _scale(plot, rows, batch, constraints)
    front = result.pareto_front(batch)
    parts = [*_axes(scale, width, height, batch, result.quality), *_bounds(scale, constraints), _front_line(scale, front, batch)]
    parts += [_whiskers(scale, row, batch) for row in rows]
    labels = place_labels(result, rows, front, batch, scale, full_names)
    parts += [_label(labels[row.name], row, scale, batch) for row in rows]
    parts += [_point(result, row, row in front, batch, scale) for row in reversed(rows)]
    title = f"Quality against speed at batch {batch}: {len(rows)} variants"
    head = f'<svg class="chart" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="group" aria-label="{title}">'
    return "\n".join([head, *(part for part in parts if part), "</svg>"])


def _constraints(result: OptimizationResult, batch: int) -> dict[str, float]:
    """Those that the chart can show; the least speed-up is asked for at the objective's batch size only."""
    shown = ("max_quality_loss", "min_speedup") if batch == result.main_batch else ("max_quality_loss",)
    return {name: result.constraints[name] for name in shown if result.constraints.get(name) is not None}


def _scale(plot: Box, rows: list[VariantRow], batch: int, constraints: Mapping[str, float]) -> Scale:
    speeds = [row.get(f"speedup_{batch}") for row in rows] + [1.0]
    keys = ("quality_change", "quality_change_low", "quality_change_high")
    losses = [row.get(key) for row in rows for key in keys if math.isfinite(row.get(key))] + [0.0]
    losses += [constraints["max_quality_loss"]] if "max_quality_loss" in constraints else []
    speeds += [constraints["min_speedup"]] if "min_speedup" in constraints else []
    return Scale.over(plot, [max(speed, 1e-3) for speed in speeds], losses)


def _axes(scale: Scale, width: int, height: int, batch: int, quality: str) -> Iterator[str]:
    plot = scale.plot
    for speed in scale.speed_ticks():
        x = scale.x(speed)
        yield f'<line class="grid{" zero" if speed == 1 else ""}" x1="{x:.1f}" x2="{x:.1f}" y1="{plot.top}" y2="{plot.bottom}"/>'
        yield f'<text class="tick" x="{x:.1f}" y="{plot.bottom + 16}" text-anchor="middle">{speed:g}×</text>'
    for loss in scale.loss_ticks():
        y = scale.y(loss)
        yield f'<line class="grid{" zero" if loss == 0 else ""}" x1="{plot.left}" x2="{plot.right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        name = "0 %" if loss == 0 else f"{loss * 100:+g} %".replace("-", "−")
        yield f'<text class="tick" x="{plot.left - 6}" y="{y + 4:.1f}" text-anchor="end">{name}</text>'
    name = f"speed against the baseline, batch {batch} (log scale) → faster" if width > 500 else f"speed, batch {batch} → faster"
    center = (plot.left + plot.right) / 2
    yield f'<text class="axis" x="{center:.0f}" y="{height - 8}" text-anchor="middle">{name}</text>'
    middle = (plot.top + plot.bottom) / 2
    yield (
        f'<text class="axis" transform="translate(12 {middle:.0f}) rotate(-90)" text-anchor="middle">'
        f"change of {quality} → better</text>"
    )


def _bounds(scale: Scale, constraints: Mapping[str, float]) -> Iterator[str]:
    """What the constraints forbid, shaded."""
    plot, limit, least = scale.plot, constraints.get("max_quality_loss"), constraints.get("min_speedup")
    if limit is not None:
        y = scale.y(limit)
        yield _shade(plot.left, y, plot.right, plot.bottom)
        yield f'<line class="bound" x1="{plot.left}" x2="{plot.right}" y1="{y:.1f}" y2="{y:.1f}"/>'
    if least is not None:
        x = scale.x(least)
        yield _shade(plot.left, plot.top, x, plot.bottom)
        yield f'<line class="bound" x1="{x:.1f}" x2="{x:.1f}" y1="{plot.top}" y2="{plot.bottom}"/>'
    for label in bound_labels(scale, constraints):
        place = f'x="{label.box.left + 2:.1f}" y="{label.box.bottom - 4:.1f}"'
        yield f'<text class="bound-name" {place}>{escape(label.text)}</text>'


def bound_labels(scale: Scale, constraints: Mapping[str, float]) -> list[Label]:
    """The constraints' names, inside what they forbid where there is room."""
    plot, limit, least = scale.plot, constraints.get("max_quality_loss"), constraints.get("min_speedup")
    labels = []
    if limit is not None:
        text, y = f"max_quality_loss {percent(limit)}", scale.y(limit)
        labels.append(Label(text, Box(plot.left + 4, y + 2, plot.left + 8 + len(text) * _GLYPH, y + FONT + 5)))
    if least is not None:
        text, x = f"min_speedup {times(least)}", scale.x(least)
        wide = len(text) * _GLYPH + 4
        left = x - 4 - wide if x - 4 - wide > plot.left else x + 4
        labels.append(Label(text, Box(left, plot.bottom - FONT - 7, left + wide, plot.bottom - 4)))
    return labels


def _shade(left: float, top: float, right: float, bottom: float) -> str:
    size = f'width="{max(right - left, 0):.1f}" height="{max(bottom - top, 0):.1f}"'
    return f'<rect class="forbidden" x="{left:.1f}" y="{top:.1f}" {size}/>'


def _front_line(scale: Scale, front: list[VariantRow], batch: int) -> str:
    """Stairs through the front: the best quality that can be had at each speed or above."""
    if len(front) < 2:
        return ""
    spots = [_spot(row, batch, scale) for row in reversed(front)]
    steps = [f"M{spots[0][0]:.1f} {spots[0][1]:.1f}"]
    steps += [f"V{y:.1f}H{x:.1f}" for x, y in spots[1:]]
    return f'<path class="front" d="{"".join(steps)}"/>'


def _spot(row: VariantRow, batch: int, scale: Scale) -> tuple[float, float]:
    return scale.x(row.get(f"speedup_{batch}")), scale.y(row.get("quality_change"))


def _whiskers(scale: Scale, row: VariantRow, batch: int) -> str:
    """The confidence intervals as a thin cross."""
    x, y = _spot(row, batch, scale)
    ends = [row.get("quality_change_low"), row.get("quality_change_high")]
    sides = [row.get(f"speedup_{batch}_low"), row.get(f"speedup_{batch}_high")]
    lines = ""
    if all(map(math.isfinite, ends)):
        lines += f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{scale.y(ends[0]):.1f}" y2="{scale.y(ends[1]):.1f}"/>'
    if all(map(math.isfinite, sides)):
        lines += f'<line x1="{scale.x(sides[0]):.1f}" x2="{scale.x(sides[1]):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'<g class="whisker">{lines}</g>' if lines else ""


def place_labels(
    result: OptimizationResult, rows: list[VariantRow], front: list[VariantRow], batch: int, scale: Scale, full_names: bool
) -> dict[str, Label]:
    """A label for each row, none upon another or upon a point: the name where it fits, else the row's number."""
    numbers = {row.name: number for number, row in enumerate(ranked(result), 1)}
    spots = {row.name: _spot(row, batch, scale) for row in rows}
    sizes = {row.name: 11 if row.status == "winner" else 6 for row in rows}
    taken = [Box(x - sizes[name], y - sizes[name], x + sizes[name], y + sizes[name]) for name, (x, y) in spots.items()]
    taken += _stairs([_spot(row, batch, scale) for row in reversed(front)])
    taken += [label.box for label in bound_labels(scale, _constraints(result, batch))]
    first = {row.name for row in rows if row.status in ("winner", "baseline")}
    wanted = sorted(rows, key=lambda row: (row.name not in first, row not in front))
    placed: dict[str, Label] = {}
    for row in wanted:
        texts = [row.name] if full_names or row.name in first else []
        texts.append(f"#{numbers[row.name]}")
        placed[row.name] = _find_room(texts, spots[row.name], scale.plot, taken, row.status == "winner")
        taken.append(placed[row.name].box)
    return placed


def _stairs(spots: list[tuple[float, float]]) -> Iterator[Box]:
    """The front's line as thin boxes, which labels keep clear of."""
    for (x, y), (next_x, next_y) in itertools.pairwise(spots):
        yield Box(x - 1, y, x + 1, next_y)
        yield Box(x, next_y - 1, next_x, next_y + 1)


def _find_room(texts: list[str], spot: tuple[float, float], plot: Box, taken: list[Box], bold: bool) -> Label:
    """The first text and place that is free; the last text beside its point where none is."""
    for text in texts:
        for label in _candidates(text, spot, bold):
            if label.box.inside(plot) and not any(label.box.meets(other) for other in taken):
                return label
    return next(_candidates(texts[-1], spot, bold))


def _candidates(text: str, spot: tuple[float, float], bold: bool) -> Iterator[Label]:
    """Places around a point, the near ones first; the far ones get a leader line."""
    (x, y), wide, tall = spot, len(text) * _GLYPH * (1.12 if bold else 1) + 4, FONT + 3
    for reach in (9, 13, 22, 34, 50, 70):
        near = reach < 20
        sides = [(x + reach, y - tall / 2), (x - reach - wide, y - tall / 2)]
        ends = [(x - wide / 2, y - reach - tall), (x - wide / 2, y + reach)]
        corners = [
            (x + reach * 0.7, y - reach * 0.7 - tall),
            (x + reach * 0.7, y + reach * 0.7),
            (x - reach * 0.7 - wide, y - reach * 0.7 - tall),
            (x - reach * 0.7 - wide, y + reach * 0.7),
        ]
        for left, top in [*sides, *ends, *corners]:
            box = Box(left, top, left + wide, top + tall)
            anchor = (min(max(x, box.left), box.right), min(max(y, box.top), box.bottom))
            yield Label(text, box, None if near else anchor)


def _label(label: Label, row: VariantRow, scale: Scale, batch: int) -> str:
    x, y = _spot(row, batch, scale)
    leader = ""
    if label.anchor:
        leader = f'<line class="leader" x1="{x:.1f}" y1="{y:.1f}" x2="{label.anchor[0]:.1f}" y2="{label.anchor[1]:.1f}"/>'
    place = f'x="{label.box.left + 2:.1f}" y="{label.box.bottom - 4:.1f}"'
    return f'{leader}<text class="name {row.status}" {place}>{escape(label.text)}</text>'


def _point(result: OptimizationResult, row: VariantRow, on_front: bool, batch: int, scale: Scale) -> str:
    """A mark that can be pointed at, focused and read aloud."""
    x, y = _spot(row, batch, scale)
    facts = [
        f"{times(row.get(f'speedup_{batch}'))} at batch {batch}, {rate(row.get(f'tokens_per_s_{batch}'))} tokens/s",
        f"{result.quality} {row.quality_loss}",
        f"{mebibytes(row.get('size_bytes'))}, {row.engine}",
        "on the Pareto front" if on_front else "beaten in both speed and quality",
    ]
    tip = escape("\n".join([row.name, *facts]), quote=True)
    shape = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
    if row.status == "baseline":
        shape = f'<path d="M{x:.1f} {y - 7:.1f}l7 7l-7 7l-7 -7z"/>'
    if row.status == "winner":
        shape = f'<circle class="halo" cx="{x:.1f}" cy="{y:.1f}" r="10"/><circle cx="{x:.1f}" cy="{y:.1f}" r="6"/>'
    kind = " ".join(["point", f"e{engine_index(result, row.engine)}", row.status, *(["on-front"] if on_front else [])])
    return (
        f'<g class="{kind}" tabindex="0" role="img" data-variant="{escape(row.name, quote=True)}" data-tip="{tip}" '
        f'aria-label="{tip}">{shape}</g>'
    )


def engine_index(result: OptimizationResult, engine: str) -> int:
    """Which of the six colours an engine has."""
    engines = list(dict.fromkeys(row.engine for row in ranked(result)))
    return engines.index(engine) % 6 if engine in engines else 5
