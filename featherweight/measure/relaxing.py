"""What to relax where no variant keeps every constraint: the one that comes nearest, and what it needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from featherweight.measure.goals import bound_shown, judge, speculation_verdicts
from featherweight.measure.spec import BASELINE, ConstraintsSpec
from featherweight.progress import Metrics

ROOM = 0.02
"""How much further than it must a bound is moved, as a share of the way, or of itself where that is less."""


@dataclass(frozen=True)
class Nearest:
    """The best found, and the bounds that it would keep, by constraint."""

    name: str
    bounds: Mapping[str, float]

    @property
    def words(self) -> str:
        """What to relax, in one line."""
        shown = ", ".join(f"{name} to {bound_shown(name, bound).lstrip('+')}" for name, bound in self.bounds.items())
        return f"relax {shown}"


def nearest(constraints: ConstraintsSpec, objective: str, variants: Mapping[str, Metrics]) -> Nearest | None:
    """The variant beside the baseline that breaks the fewest constraints, by the least; None where one keeps all."""
    found: list[tuple[int, float, str, dict[str, float]]] = []
    for name, metrics in variants.items():
        broken = [one for one in judge(constraints, objective, metrics) if not one.kept]
        slowed = any(not one.kept for one in speculation_verdicts(objective, metrics))
        if name == BASELINE or slowed or any(one.value is None for one in broken):
            continue
        if not broken:
            return None
        bounds = {one.constraint: _beyond(float(one.value or 0.0), one.bound) for one in broken}
        excess = sum(abs(bounds[one.constraint] - one.bound) / (abs(one.bound) or 1.0) for one in broken)
        found.append((len(broken), excess, name, bounds))
    _, _, name, bounds = min(found, key=lambda one: one[:3], default=(0, 0.0, "", {}))
    return Nearest(name, bounds) if name else None


def _beyond(value: float, bound: float) -> float:
    """A bound that a value keeps, a little wider, so that it does so as people read it."""
    way = value - bound
    return value + math.copysign(ROOM * min(abs(way), abs(value) or math.inf), way)
