"""Goals: what a recipe asks of a variant, judged by the flat metrics of `Comparison.metrics()`.

The decide stage and the promotion gate both judge here, so that neither accepts what the other refuses. Speed and latency are
judged at the batch size that the objective names ('speedup@8'); the others name none and take the smallest measured. 'ttft@512' is
the time to the first token of a prompt of so many tokens. What requests wait that come at a rate is judged at every rate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain

from featherweight.measure.batching import UNMEASURED, Batching
from featherweight.measure.figures import mebibytes, milliseconds, percent, plain, points, seconds, share, times, with_interval
from featherweight.measure.spec import ConstraintsSpec
from featherweight.measure.statistics import Estimate
from featherweight.progress import Metrics

OBJECTIVE = "speedup@1"
"""Where nobody says another."""


@dataclass(frozen=True)
class Figure:
    """One figure of a variant: its key among the metrics, what it is called, how it is written, and whether more is better.

    interval: measured with a confidence interval, `KEY_low` to `KEY_high`; a figure without one is its own interval.
    at: the batch size in words, where the figure has one.
    """

    key: str
    name: str
    show: Callable[[float], str]
    more: bool = False
    interval: bool = False
    at: str = ""

    def read(self, metrics: Metrics) -> Estimate | None:
        """The figure of a variant, None where it, or its interval, was not measured or is no finite number."""
        keys = (self.key, f"{self.key}_low", f"{self.key}_high") if self.interval else (self.key,) * 3
        values = [metrics.get(key, math.nan) for key in keys]
        return Estimate(*values) if all(map(math.isfinite, values)) else None

    def loss(self, value: float) -> float:
        """The value turned so that less is better."""
        return -value if self.more else value

    def worst(self, estimate: Estimate) -> float:
        """The bound of the interval that bad luck may have left standing."""
        return estimate.low if self.more else estimate.high

    def best(self, estimate: Estimate) -> float:
        """The bound of the interval on the good side."""
        return estimate.high if self.more else estimate.low

    def keeps(self, value: float, bound: float) -> bool:
        """Whether a value is as good as a bound."""
        return self.loss(value) <= self.loss(bound)

    def text(self, estimate: Estimate) -> str:
        """The figure in words: 'speed 7.93x [7.85, 8.01] at batch 8'."""
        return f"{self.name} {with_interval(estimate, self.show)}{self.at}"


QUALITY = Figure("quality_change", "quality loss", percent, interval=True)
BITS_PER_BYTE = Figure("bits_per_byte", "bits per byte", plain)
SIZE = Figure("size_bytes", "size", mebibytes)
PEAK_MEMORY = Figure("peak_memory_bytes", "peak memory", mebibytes)

CHANGED_ANSWERS = Figure("changed_answers", "changed answers", share, interval=True)

ACCURACY_LOSS = Figure("accuracy_loss", "accuracy loss", percent, interval=True)

REFERENCE_LOSS = Figure("reference_loss", "loss against the references", points, interval=True)


def speed(batch_size: int) -> Figure:
    """How many times faster than the baseline."""
    return Figure(f"speedup_{batch_size}", "speed", times, more=True, interval=True, at=f" at batch {batch_size}")


def against_plain(batch_size: int) -> Figure:
    """How many times faster than the same variant without speculation."""
    key = f"speculation_speedup_{batch_size}"
    return Figure(key, "speed against the same without speculation", times, more=True, interval=True, at=f" at batch {batch_size}")


def timed(key: str, name: str, interval: bool = False) -> Callable[[int], Figure]:
    """A time by its key without the batch size, of which the figure is made."""
    return lambda batch: Figure(f"{key}_{batch}", name, milliseconds, interval=interval, at=f" at batch {batch}")


def prompt_ttft(tokens: int) -> Figure:
    """The time to the first token behind a prompt of so many."""
    return Figure(f"ttft_s_prompt_{tokens}", "time to first token", milliseconds, interval=True, at=f" behind {tokens} tokens")


def prompt_speed(tokens: int) -> Figure:
    """How many times sooner than the baseline the first token comes behind a prompt of so many."""
    key = f"ttft_speedup_prompt_{tokens}"
    return Figure(key, "first token", times, more=True, interval=True, at=f" sooner behind {tokens} tokens")


def waited(key: str, name: str) -> Callable[[str], Figure]:
    """What requests wait by its key without the rate, of which the figure is made; of an empty one at every rate."""

    def figure(rate: str) -> Figure:
        at = f" at {rate} requests a second" if rate else " at every rate of requests"
        return Figure(f"{key}_rate_{rate}" if rate else f"{key}_requests", name, milliseconds, interval=True, at=at)

    return figure


REQUESTS: Mapping[str, Callable[[str], Figure]] = {
    "max_p95_request_s": waited("p95_latency_s", "p95 latency"),
    "max_p99_request_s": waited("p99_latency_s", "p99 latency"),
    "max_p99_request_ttft_s": waited("p99_ttft_s", "p99 time to first token"),
}
"""The figure that each key of ConstraintsSpec bounds that is about `workload.requests`, at a rate."""
CONSTRAINTS: Mapping[str, Callable[[int], Figure]] = {
    "max_quality_loss": lambda _: QUALITY,
    "min_speedup": speed,
    "max_size_bytes": lambda _: SIZE,
    "max_p95_latency_s": timed("p95_latency_s", "p95 latency"),
    "max_p99_latency_s": timed("p99_latency_s", "p99 latency"),
    "max_ttft_s": timed("ttft_s", "time to first token", interval=True),
    "max_inter_token_s": timed("inter_token_s", "time between tokens"),
    "max_startup_s": lambda _: Figure("startup_s", "time to start", seconds),
    "max_peak_memory_bytes": lambda _: PEAK_MEMORY,
    "max_changed_answers": lambda _: CHANGED_ANSWERS,
    "max_accuracy_loss": lambda _: ACCURACY_LOSS,
    "max_reference_loss": lambda _: REFERENCE_LOSS,
    "max_p95_request_s": lambda _: REQUESTS["max_p95_request_s"](""),
    "max_p99_request_s": lambda _: REQUESTS["max_p99_request_s"](""),
    "max_p99_request_ttft_s": lambda _: REQUESTS["max_p99_request_ttft_s"](""),
}
"""The figure that each key of ConstraintsSpec bounds, at a batch size."""


def bounded(constraint: str, batch_size: int) -> Figure:
    """The figure that a name of ConstraintsSpec.bounds is about."""
    name, _, at = constraint.partition(".")
    if at:
        return REQUESTS[name](at) if name in REQUESTS else prompt_ttft(int(at))
    return CONSTRAINTS[name](batch_size)


def measured_batches(metrics: Iterable[str]) -> list[int]:
    """The batch sizes that a speed was measured at, the smallest first, by the names of the metrics."""
    return sorted({int(found[1]) for key in metrics if (found := re.fullmatch(r"speedup_(\d+)", key))})


def timed_prompts(metrics: Iterable[str]) -> list[int]:
    """The lengths of prompts that a time to the first token was measured at, the shortest first, by the names of the metrics."""
    return sorted({int(found[1]) for key in metrics if (found := re.fullmatch(r"ttft_s_prompt_(\d+)", key))})


def request_rates(metrics: Iterable[str]) -> list[str]:
    """The rates that requests came at, the lowest first, by the names of the metrics."""
    found = {found[1] for key in metrics if (found := re.fullmatch(r"done_rate_([\d.e+-]+)", key))}
    return sorted(found, key=float)


def judged_batch(objective: str, metrics: Iterable[str]) -> int:
    """The batch size that speed and latency are judged at: see the head of this file; 1 where none was measured."""
    kind, _, named = objective.partition("@")
    return int(named) if kind == "speedup" else next(iter(measured_batches(metrics)), 1)


def judged_speed(objective: str, metrics: Iterable[str]) -> tuple[Figure, str]:
    """The speed beside the baseline that the objective is about, and the metric that holds the spread of the baseline's rounds."""
    kind, _, named = objective.partition("@")
    if kind == "ttft":
        return prompt_speed(int(named)), f"noise_prompt_{named}"
    batch_size = judged_batch(objective, metrics)
    return speed(batch_size), f"noise_{batch_size}"


def judged_threads(objective: str, metrics: Metrics) -> int:
    """The number of threads to serve with: that under requests at a rate, else the best at what the objective is judged at."""
    kind, _, named = objective.partition("@")
    at = f"prompt_{named}" if kind == "ttft" else judged_batch(objective, metrics)
    at = "requests" if "threads_requests" in metrics else at
    return int(metrics.get(f"threads_{at}", 1))


def judged_batching(metrics: Metrics) -> Batching:
    """How requests are answered together: as was chosen where they came at a rate, else up to the largest batch that was timed."""
    largest = int(metrics.get("max_batch_requests", max(measured_batches(metrics), default=UNMEASURED.max_batch)))
    return Batching(largest, metrics.get("batch_window_s_requests", 0.0))


def bound_shown(constraint: str, bound: float) -> str:
    """The bound of a constraint as people read it."""
    return bounded(constraint, 1).show(bound)


@dataclass(frozen=True)
class Objective:
    """What the winner is best in, and what decides among those that are level in it."""

    figure: Figure
    tie: Figure

    @classmethod
    def of(cls, name: str, metrics: Metrics) -> Objective:
        """The objective of that name for a variant with these metrics."""
        judged, _ = judged_speed(name, metrics)
        return cls(QUALITY, judged) if name == "quality" else cls(SIZE if name == "size" else judged, QUALITY)


@dataclass(frozen=True)
class Verdict:
    """Whether a constraint is surely kept, in words with its numbers. value: the bound of the interval that was judged."""

    constraint: str
    kept: bool
    reason: str
    value: float | None
    bound: float


def judge(constraints: ConstraintsSpec, objective: str, metrics: Metrics) -> list[Verdict]:
    """One verdict for each constraint that is set: kept by the worse bound of the confidence interval, not by the estimate.

    What was not measured is not kept.
    """
    batch_size = judged_batch(objective, metrics)
    return [_verdict(name, bounded(name, batch_size), bound, metrics) for name, bound in constraints.bounds.items()]


def speculation_verdicts(objective: str, metrics: Metrics) -> list[Verdict]:
    """Of a variant with speculation: it is surely no slower than without where the objective judges, and surely slower at none
    of the other batch sizes."""
    judged, verdicts = judged_batch(objective, metrics), []
    for batch in measured_batches(metrics):
        figure = against_plain(batch)
        estimate = figure.read(metrics)
        if estimate is None:
            continue
        value = figure.worst(estimate) if batch == judged else figure.best(estimate)
        wanted = "surely no less than" if batch == judged else "not surely less than"
        reason = f"{figure.text(estimate)}, wanted {wanted} {figure.show(1.0)}"
        verdicts.append(Verdict(f"speculation@{batch}", figure.keeps(value, 1.0), reason, value, 1.0))
    return verdicts


def _verdict(name: str, figure: Figure, bound: float, metrics: Metrics) -> Verdict:
    estimate = figure.read(metrics)
    if estimate is None:
        return Verdict(name, False, not_measured(figure), None, bound)
    asked = "wanted" if figure.more else "allowed"
    value = figure.worst(estimate)
    return Verdict(name, figure.keeps(value, bound), f"{figure.text(estimate)}, {asked} {figure.show(bound)}", value, bound)


def not_measured(figure: Figure) -> str:
    """Why a figure cannot be judged."""
    if "_rate_" in figure.key or figure.key.endswith("_requests"):
        why = "too few requests were answered, or they waited for each other; set workload.requests.seconds higher"
        return f"{figure.name}{figure.at} is not known: {why}"
    return f"{figure.key} was not measured" + (" with its confidence interval" if figure.interval else "")


def pareto_front(variants: Mapping[str, Metrics], batch_size: int) -> tuple[str, ...]:
    """Names that no other beats in both speed and quality, by point estimates, the fastest first; the unmeasured left out."""
    axes = (speed(batch_size), QUALITY)
    points = {name: [axis.loss(metrics.get(axis.key, math.nan)) for axis in axes] for name, metrics in variants.items()}
    measured = (name for name, point in points.items() if all(map(math.isfinite, point)))
    front: list[str] = []
    for name in sorted(measured, key=lambda name: points[name]):
        if not front or points[name][1] < points[front[-1]][1]:
            front.append(name)
    return tuple(front)


@dataclass(frozen=True)
class Decision:
    """The winner (None where nobody keeps the constraints), why it won, why each other lost, and the Pareto front.

    pareto: names that no other beats in quality and speed at once, the fastest first.
    """

    winner: str | None
    summary: str
    reasons: Mapping[str, str]
    pareto: tuple[str, ...]


def choose_winner(constraints: ConstraintsSpec, objective: str, variants: Mapping[str, Metrics]) -> Decision:
    """Keep who satisfies every constraint with its confidence bound, then maximise the objective.

    objective: 'speedup@N', 'ttft@N', 'size' or 'quality'. variants: metrics by name. Who is not surely behind the leader is
    level with it, and of those that are level the better quality wins (for 'quality': the faster), so that noise never decides.
    """
    broken = {name: "; ".join(_refusals(constraints, objective, metrics)) for name, metrics in variants.items()}
    kept = [_Candidate.of(name, Objective.of(objective, variants[name]), variants[name]) for name in variants if not broken[name]]
    front = pareto_front(variants, judged_batch(objective, chain.from_iterable(variants.values())))
    if not kept:
        return Decision(None, "no variant keeps every constraint with its confidence bound", broken, front)
    leader = min(kept, key=lambda one: (one.sure, one.tie_break))
    level = [one for one in kept if one.score <= leader.sure]
    winner = min(level, key=lambda one: (one.tie_break, one.sure))
    behind = {one.name: one.behind(winner, one in level) for one in kept if one is not winner}
    reasons = {name: broken[name] or behind[name] for name in variants if name != winner.name}
    return Decision(winner.name, winner.praise(len(kept), len(level)), reasons, front)


def _refusals(constraints: ConstraintsSpec, objective: str, metrics: Metrics) -> list[str]:
    """Why a variant may not win: broken constraints, speculation that slows it, figures that were not measured."""
    wanted = Objective.of(objective, metrics)
    missing = [not_measured(figure) for figure in (wanted.figure, wanted.tie) if figure.read(metrics) is None]
    judged = [*judge(constraints, objective, metrics), *speculation_verdicts(objective, metrics)]
    return list(dict.fromkeys([*(one.reason for one in judged if not one.kept), *missing]))


@dataclass(frozen=True)
class _Candidate:
    """A variant that keeps every constraint, in the light of an objective; of its numbers, less is better."""

    name: str
    objective: Objective
    value: Estimate
    tie: Estimate

    @classmethod
    def of(cls, name: str, objective: Objective, metrics: Metrics) -> _Candidate:
        value, tie = objective.figure.read(metrics), objective.tie.read(metrics)
        assert value is not None and tie is not None, "refused before"
        return cls(name, objective, value, tie)

    @property
    def score(self) -> float:
        return self.objective.figure.loss(self.value.value)

    @property
    def sure(self) -> float:
        """The score with bad luck."""
        return self.objective.figure.loss(self.objective.figure.worst(self.value))

    @property
    def tie_break(self) -> float:
        """What decides among those that are level. Speed by its bad-luck bound: its rounds are noisier than paired quality."""
        tie = self.objective.tie
        return tie.loss(self.tie.value) if tie is QUALITY else tie.loss(tie.worst(self.tie))

    def behind(self, winner: _Candidate, level: bool) -> str:
        """Why this one lost to `winner` although it keeps every constraint."""
        against = f"{self._shown()}, against the winner's {winner._shown()}"
        return f"{against}: level; {self._tie_shown()}, against {winner._tie_shown()}" if level else against

    def praise(self, kept: int, level: int) -> str:
        """Why this one won, among `kept` that keep every constraint, of which `level` are level in the objective."""
        figures = f"{self._shown()}, {self._tie_shown()}"
        if level > 1:
            second = "quality" if self.objective.tie is QUALITY else "speed"
            return f"{figures}: the best in {second} of {level} that are level within the noise ({kept} keep every constraint)"
        return f"{figures}: the best of {kept} that keep every constraint"

    def _shown(self) -> str:
        return self.objective.figure.text(self.value)

    def _tie_shown(self) -> str:
        return self.objective.tie.text(self.tie)
