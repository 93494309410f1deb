"""Goals: the constraints that a winner keeps, the objective that it maximises, and the choice of the winner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from featherweight.measure.measurement import Comparison
from featherweight.measure.spec import ConstraintsSpec
from featherweight.measure.statistics import Estimate


@dataclass(frozen=True)
class Decision:
    """The winner (None where nobody keeps the constraints), why it won, why each other lost, and the Pareto front.

    pareto: names that no other beats in quality and speed at once, the fastest first.
    """

    winner: str | None
    summary: str
    reasons: Mapping[str, str]
    pareto: tuple[str, ...]


def choose_winner(constraints: ConstraintsSpec, objective: str, measurements: Mapping[str, Comparison]) -> Decision:
    """Keep who satisfies every constraint with its confidence bound, then maximise the objective.

    objective: 'speedup@N', 'size' or 'quality'. Who is not surely behind the leader is level with it, and of those that are
    level the better quality wins (for 'quality': the faster), so that noise alone never decides.
    """
    candidates = [_Candidate(name, comparison, objective) for name, comparison in measurements.items()]
    broken = {one.name: "; ".join(one.broken(constraints)) for one in candidates}
    kept = [one for one in candidates if not broken[one.name]]
    front = _pareto(candidates)
    if not kept:
        return Decision(None, "no variant keeps every constraint with its confidence bound", broken, front)
    leader = min(kept, key=lambda one: (one.sure, one.tie_break))
    level = [one for one in kept if one.score.value <= leader.sure]
    winner = min(level, key=lambda one: (one.tie_break, one.sure))
    reasons = {one.name: broken[one.name] or one.behind(winner, one in level) for one in candidates if one is not winner}
    return Decision(winner.name, winner.praise(len(kept), len(level)), reasons, front)


class _Candidate:
    """A variant in the light of an objective. `score` is what counts, smaller is better; `sure` is its bad-luck bound."""

    def __init__(self, name: str, comparison: Comparison, objective: str) -> None:
        self.name, self.comparison, self.objective = name, comparison, objective
        _, _, batch = objective.partition("@")
        self.batch_size = int(batch) if batch else min(comparison.batch_sizes)
        self.speedup = comparison.speedup(self.batch_size)
        self.quality = comparison.quality_change
        self.size = comparison.variant.size_bytes
        self.score = self._score()
        self.sure = self.score.high

    def _score(self) -> Estimate:
        if self.objective == "quality":
            return self.quality
        if self.objective == "size":
            return Estimate(self.size, self.size, self.size)
        return Estimate(-self.speedup.value, -self.speedup.high, -self.speedup.low)

    @property
    def tie_break(self) -> float:
        """Smaller is better among those that are level in the objective."""
        return -self.speedup.low if self.objective == "quality" else self.quality.value

    def broken(self, bounds: ConstraintsSpec) -> Iterator[str]:
        """Each constraint that is not surely kept, with its numbers."""
        variant = self.comparison.variant
        p95_s = variant.speed(self.batch_size).latency_s(0.95)
        if bounds.max_quality_loss is not None and self.quality.high > bounds.max_quality_loss:
            yield f"quality loss {_percent(self.quality)}, allowed {bounds.max_quality_loss:.2%}"
        if bounds.min_speedup is not None and self.speedup.low < bounds.min_speedup:
            yield f"speed {_times(self.speedup)} at batch {self.batch_size}, wanted {bounds.min_speedup:g}x"
        if bounds.max_size_bytes is not None and self.size > bounds.max_size_bytes:
            yield f"size {_mb(self.size)}, allowed {_mb(bounds.max_size_bytes)}"
        if bounds.max_p95_latency_s is not None and p95_s > bounds.max_p95_latency_s:
            yield f"p95 latency {p95_s:.3g} s at batch {self.batch_size}, allowed {bounds.max_p95_latency_s:g} s"
        if bounds.max_peak_memory_bytes is not None and variant.peak_memory_bytes > bounds.max_peak_memory_bytes:
            yield f"peak memory {_mb(variant.peak_memory_bytes)}, allowed {_mb(bounds.max_peak_memory_bytes)}"

    def shown(self) -> str:
        """The objective's figure."""
        if self.objective == "quality":
            return f"quality loss {_percent(self.quality)}"
        if self.objective == "size":
            return f"size {_mb(self.size)}"
        return f"{_times(self.speedup)} at batch {self.batch_size}"

    def _tie(self) -> str:
        if self.objective == "quality":
            return f"{_times(self.speedup)} at batch {self.batch_size}"
        return f"quality loss {_percent(self.quality)}"

    def behind(self, winner: _Candidate, level: bool) -> str:
        """Why this one lost to `winner` although it keeps every constraint."""
        against = f"{self.shown()}, against the winner's {winner.shown()}"
        return f"{against}: level; {self._tie()}, against {winner._tie()}" if level else against

    def praise(self, kept: int, level: int) -> str:
        """Why this one won, among `kept` that keep every constraint, of which `level` are level in the objective."""
        figures = f"{self.shown()}, {self._tie()}"
        if level > 1:
            second = "speed" if self.objective == "quality" else "quality"
            return f"{figures}: the best in {second} of {level} that are level within the noise ({kept} keep every constraint)"
        return f"{figures}: the best of {kept} that keep every constraint"


def _pareto(candidates: list[_Candidate]) -> tuple[str, ...]:
    """Names on the front of quality against speed, by point estimates."""
    front: list[_Candidate] = []
    for one in sorted(candidates, key=lambda one: (-one.speedup.value, one.quality.value)):
        if not front or one.quality.value < front[-1].quality.value:
            front.append(one)
    return tuple(one.name for one in front)


def _percent(estimate: Estimate) -> str:
    return f"{estimate.value:+.2%} [{estimate.low:+.2%}, {estimate.high:+.2%}]"


def _times(estimate: Estimate) -> str:
    return f"{estimate.value:.2f}x [{estimate.low:.2f}, {estimate.high:.2f}]"


def _mb(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:.1f} MB"
