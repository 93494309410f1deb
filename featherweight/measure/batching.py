"""How many requests are answered together, and how long a batch waits for others: tried under requests, as threads are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import fmean

from featherweight.measure.request import Request

TRIAL_S = 6.0
"""So long requests come in a trial at most."""
LEVEL = 1.05
"""Within this factor of the shortest wait one is as good, and the largest batch with the shortest window is taken."""


@dataclass(frozen=True)
class Batching:
    """At most `max_batch` are answered together; the first of a batch that is not full waits `window_s` for others."""

    max_batch: int
    window_s: float = 0.0


UNMEASURED = Batching(8)
"""Where nothing is known."""


@dataclass(frozen=True)
class Trial:
    """What requests waited on average; those that were given up as long as they were patient."""

    batching: Batching
    wait_s: float


def tried(
    batches: Sequence[int],
    windows_s: Sequence[float],
    attempt: Callable[[Batching], Sequence[Request]],
    patience_s: float,
) -> tuple[Trial, ...]:
    """The largest batches with the shortest window, then the other windows with the best of them; of one alone nothing is tried.

    Where no request comes while another is answered no batch ever forms, and the first trial is the last.
    """
    sizes, windows = sorted(set(batches), reverse=True), sorted(set(windows_s))
    if len(sizes) == len(windows) == 1:
        return ()
    trials = list[Trial]()

    def look(batching: Batching) -> bool:
        requests = attempt(batching)
        trials.append(Trial(batching, fmean(min(one.latency_s, patience_s) for one in requests)))
        return _overlap(requests)

    if not look(Batching(sizes[0], windows[0])):
        return tuple(trials)
    for size in sizes[1:]:
        look(Batching(size, windows[0]))
    if (best := best_batching(trials)).max_batch > 1:
        for window in windows[1:]:
            look(Batching(best.max_batch, window))
    return tuple(trials)


def best_batching(trials: Sequence[Trial]) -> Batching:
    """The one whose requests waited least; of those that are level with it the largest batch, with the shortest window."""
    least = min(trial.wait_s for trial in trials)
    level = [trial.batching for trial in trials if trial.wait_s <= LEVEL * least]
    return max(level, key=lambda one: (one.max_batch, -one.window_s))


def _overlap(requests: Sequence[Request]) -> bool:
    """Whether one came before all that had come earlier were answered."""
    free = accumulate((one.came_s + one.latency_s for one in requests), max)
    return any(later.came_s < until for (_, later), until in zip(pairwise(requests), free, strict=False))
