"""A served variant under requests that come when they come: when they do, how long each waited, how many were answered."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from random import Random
from typing import Any

from featherweight.measure.statistics import Estimate, correlation_time, quantile_estimate, share_of

QUANTILES = (0.5, 0.95, 0.99)


def arrivals(rate: float, count: int, seed: int) -> tuple[float, ...]:
    """When `count` requests come that know nothing of each other, `rate` of them a second on average: a Poisson process.

    Seconds, in order; the gaps are exponential.
    """
    draw = Random(seed)
    return tuple(accumulate(draw.expovariate(rate) for _ in range(count)))


@dataclass(frozen=True)
class Request:
    """Seconds since its round began: when it came, when its first token was there, when it was answered.

    None where that never came: it was given up.
    """

    came_s: float
    first_s: float | None
    answered_s: float | None

    @property
    def latency_s(self) -> float:
        """From its coming to its answer, the waiting included; infinite where there was none."""
        return math.inf if self.answered_s is None else self.answered_s - self.came_s

    @property
    def ttft_s(self) -> float:
        """From its coming to its first token; infinite where it was given up."""
        return math.inf if self.first_s is None or self.answered_s is None else self.first_s - self.came_s


@dataclass(frozen=True)
class Load:
    """Requests at `rate` a second, answered with `new_tokens` each by an engine of `threads` threads, in rounds."""

    rate: float
    threads: int
    new_tokens: int
    rounds: tuple[tuple[Request, ...], ...]

    @property
    def requests(self) -> list[Request]:
        """Those of all rounds."""
        return list(chain.from_iterable(self.rounds))

    @property
    def at(self) -> str:
        """What stands behind the names of its figures."""
        return rate_name(self.rate)

    @property
    def done(self) -> Estimate:
        """The share of the requests that were answered; those that wait in one line are given up together."""
        answered = [[float(one.answered_s is not None) for one in requests] for requests in self.rounds]
        together = correlation_time(answered)
        return share_of(sum(map(sum, answered)) / together, len(self.requests) / together)

    @property
    def tokens_per_s(self) -> float:
        """New tokens of all that was answered, a second, from the first request of each round to its last answer."""
        answered = [[one for one in requests if one.answered_s is not None] for requests in self.rounds]
        spans = (max(one.answered_s or 0.0 for one in ones) - ones[0].came_s for ones in answered if ones)
        return sum(map(len, answered)) * self.new_tokens / (sum(spans) or math.inf)

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        """Its figures with their intervals; those of waiting may be infinite."""
        found = {"done": self.done}
        for kind in ("latency_s", "ttft_s"):
            waits = [[getattr(one, kind) for one in requests] for requests in self.rounds]
            found |= {f"p{round(100 * share)}_{kind}": quantile_estimate(waits, share) for share in QUANTILES}
        return found

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Load:
        """The inverse of `dataclasses.asdict` and a trip through JSON."""
        rounds = tuple(tuple(Request(**one) for one in requests) for requests in tree["rounds"])
        return cls(**{**tree, "rounds": rounds})


def rate_name(rate: float) -> str:
    """What stands behind the names of the figures at a rate."""
    return f"rate_{rate:g}"


def worst(estimates: list[Estimate]) -> Estimate:
    """The longest of several waits, bound by bound."""
    return Estimate(*(max(getattr(one, bound) for one in estimates) for bound in ("value", "low", "high")))
