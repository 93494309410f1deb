"""Measurements of served variants, their comparison with the baseline, and the choice of a winner."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from featherweight.errors import IntegrityError, StageError
from featherweight.recipe import ConstraintsSpec
from featherweight.statistics import Estimate, bootstrap_median_ratio, bootstrap_ratio

FILE = "measurement.json"


@dataclass(frozen=True)
class Quality:
    """Per window of text: summed negative log-likelihood in nats, scored tokens, and the UTF-8 bytes that they stand for."""

    nll: tuple[float, ...]
    tokens: tuple[int, ...]
    bytes: tuple[int, ...]

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(sum(self.nll) / sum(self.tokens))

    @property
    def bits_per_byte(self) -> float:
        """Cross-entropy per byte of text: comparable across tokenizers, unlike perplexity."""
        return sum(self.nll) / math.log(2) / sum(self.bytes)


@dataclass(frozen=True)
class Speed:
    """Timed generations of `batch_size` prompts of `prompt_tokens` to `new_tokens` new ones each, in seconds.

    total_s, ttft_s: round after round, `repeats` generations in each (a quick engine runs several in its turn).
    warmup_s: the first generation, with what the engine compiles for it. probe: what the thread counts that were tried took.
    """

    batch_size: int
    threads: int
    prompt_tokens: int
    new_tokens: int
    total_s: tuple[float, ...]
    ttft_s: tuple[float, ...]
    repeats: int = 1
    warmup_s: float = 0.0
    probe: Mapping[int, tuple[float, ...]] = field(default_factory=dict)

    @property
    def rounds_s(self) -> list[float]:
        """One latency per round: the median of its generations."""
        starts = range(0, len(self.total_s), self.repeats)
        return [median(self.total_s[start : start + self.repeats]) for start in starts]

    def latency_s(self, share: float) -> float:
        """The quantile `share` of the latency of one whole generation."""
        return quantile(self.total_s, share)

    @property
    def median_ttft_s(self) -> float:
        """Time to first token."""
        return median(self.ttft_s)

    @property
    def inter_token_s(self) -> float:
        """Time between two tokens of one sequence, after the first."""
        steps = max(1, self.new_tokens - 1)
        return median((total - first) / steps for total, first in zip(self.total_s, self.ttft_s, strict=True))

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second, all sequences together, at the median latency."""
        return self.batch_size * self.new_tokens / median(self.total_s)

    @property
    def noise(self) -> float:
        """Spread of the rounds: largest less smallest, over the median."""
        return (max(self.rounds_s) - min(self.rounds_s)) / median(self.rounds_s)


@dataclass(frozen=True)
class Measurement:
    """One served variant on its own engine. Peak memory is that of the serving processes, up to the end of the speed rounds."""

    engine: str
    quality: Quality
    speeds: tuple[Speed, ...]
    peak_memory_bytes: int
    size_bytes: int
    startup_s: float

    def speed(self, batch_size: int) -> Speed:
        """The measurement at a batch size; raises StageError if there is none."""
        for speed in self.speeds:
            if speed.batch_size == batch_size:
                return speed
        measured = ", ".join(str(speed.batch_size) for speed in self.speeds)
        raise StageError(f"batch size {batch_size} was not measured; measured: {measured}")

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Measurement:
        """The inverse of `dataclasses.asdict` and a trip through JSON."""
        quality = Quality(**{key: tuple(values) for key, values in tree["quality"].items()})
        return cls(**{**tree, "quality": quality, "speeds": tuple(_speed(speed) for speed in tree["speeds"])})


def _speed(tree: Mapping[str, Any]) -> Speed:
    probe = {int(count): tuple(times) for count, times in tree["probe"].items()}
    return Speed(**{**tree, "probe": probe, "total_s": tuple(tree["total_s"]), "ttft_s": tuple(tree["ttft_s"])})


@dataclass(frozen=True)
class Comparison:
    """A variant beside the baseline that ran in turns with it: round i of one is paired with round i of the other."""

    variant: Measurement
    baseline: Measurement
    machine: str = ""

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Batch sizes that were measured."""
        return tuple(speed.batch_size for speed in self.variant.speeds)

    def speedup(self, batch_size: int) -> Estimate:
        """How many times faster than the baseline, by the median over paired rounds."""
        return bootstrap_median_ratio(
            self.baseline.speed(batch_size).rounds_s, self.variant.speed(batch_size).rounds_s, seed=batch_size
        )

    @cached_property
    def quality_change(self) -> Estimate:
        """Relative change of bits per byte, paired by window; worse is positive."""
        if self.variant.quality.bytes != self.baseline.quality.bytes:
            raise StageError("the variant and the baseline were scored on different windows; evaluate both anew")
        return bootstrap_ratio(self.variant.quality.nll, self.baseline.quality.nll).shifted(-1.0)

    def metrics(self) -> dict[str, float]:
        """Everything as flat figures: N in a name is a batch size, `_low` and `_high` bound a 95 % confidence interval."""
        quality, variant = self.variant.quality, self.variant
        figures = {"bits_per_byte": quality.bits_per_byte, "perplexity": quality.perplexity, "windows": len(quality.nll)}
        figures |= _bounded("quality_change", self.quality_change)
        figures |= {key: getattr(variant, key) for key in ("peak_memory_bytes", "size_bytes", "startup_s")}
        for batch_size in self.batch_sizes:
            figures |= _bounded(f"speedup_{batch_size}", self.speedup(batch_size))
            figures |= {f"{key}_{batch_size}": value for key, value in _figures(variant.speed(batch_size)).items()}
            figures[f"noise_{batch_size}"] = self.baseline.speed(batch_size).noise
        return {key: float(value) for key, value in figures.items()}

    def write(self, folder: Path) -> None:
        """Write `folder/measurement.json`: every raw figure of both sides, and the metrics made of them."""
        tree = asdict(self) | {"metrics": self.metrics()}
        (folder / FILE).write_text(json.dumps(tree, indent=1))

    @classmethod
    def read(cls, folder: Path) -> Comparison:
        """Read what `write` wrote; raises IntegrityError where there is nothing, or nothing sensible."""
        try:
            tree = json.loads((folder / FILE).read_text())
            variant, baseline = (Measurement.from_json(tree[side]) for side in ("variant", "baseline"))
            return cls(variant, baseline, tree["machine"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{folder / FILE} is no measurement ({error}); evaluate the variant anew") from error


def quantile(values: tuple[float, ...], share: float) -> float:
    """Linear interpolation between the ordered values, as numpy's default."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _bounded(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _figures(speed: Speed) -> dict[str, float]:
    """The figures of one batch size, by their names without it."""
    latencies = {f"p{round(100 * share)}_latency_s": speed.latency_s(share) for share in (0.5, 0.95, 0.99)}
    return latencies | {
        "tokens_per_s": speed.tokens_per_s,
        "ttft_s": speed.median_ttft_s,
        "inter_token_s": speed.inter_token_s,
        "threads": speed.threads,
        "warmup_s": speed.warmup_s,
    }


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
