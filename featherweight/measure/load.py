"""A served variant under requests that come when they come: when they do, how long each waited, how many were answered."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from random import Random
from typing import Any

from featherweight.measure.batching import Batching, Trial
from featherweight.measure.request import Request
from featherweight.measure.statistics import Estimate, correlation_time, quantile_estimate, share_of

QUANTILES = (0.5, 0.95, 0.99)


def arrivals(rate: float, count: int, seed: int) -> tuple[float, ...]:
    """When `count` requests come that know nothing of each other, `rate` of them a second on average: a Poisson process.

    Seconds, in order; the gaps are exponential.
    """
    draw = Random(seed)
    return tuple(accumulate(draw.expovariate(rate) for _ in range(count)))


@dataclass(frozen=True)
class Load:
    """Requests at `rate` a second, answered with `new_tokens` each by an engine of `threads` threads, in rounds.

    new_tokens: 0 of an encoder, which answers at once. batching: how they were answered together, None where that was not kept;
    tried: what the ways that were tried took.
    """

    rate: float
    threads: int
    new_tokens: int
    rounds: tuple[tuple[Request, ...], ...]
    batching: Batching | None = None
    tried: tuple[Trial, ...] = ()

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
    def served_per_s(self) -> float:
        """Requests that were answered, a second, from the first of each round to its last answer."""
        answered = [[one for one in requests if one.answered_s is not None] for requests in self.rounds]
        spans = (max(one.answered_s or 0.0 for one in ones) - ones[0].came_s for ones in answered if ones)
        return sum(map(len, answered)) / (sum(spans) or math.inf)

    @property
    def rates(self) -> dict[str, float]:
        """What was answered, a second: requests, and new tokens where there are any."""
        served = self.served_per_s
        return {"served_per_s": served} | ({"tokens_per_s": served * self.new_tokens} if self.new_tokens else {})

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        """Its figures with their intervals; those of waiting may be infinite."""
        found = {"done": self.done}
        for kind in ("latency_s", "ttft_s") if self.new_tokens else ("latency_s",):
            waits = [[getattr(one, kind) for one in requests] for requests in self.rounds]
            found |= {f"p{round(100 * share)}_{kind}": quantile_estimate(waits, share) for share in QUANTILES}
        return found

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Load:
        """The inverse of `dataclasses.asdict` and a trip through JSON."""
        rounds = tuple(tuple(Request(**one) for one in requests) for requests in tree["rounds"])
        batching = Batching(**tree["batching"]) if tree.get("batching") else None
        tried = tuple(Trial(Batching(**one["batching"]), one["wait_s"]) for one in tree.get("tried", ()))
        return cls(**{**tree, "rounds": rounds, "batching": batching, "tried": tried})


def rate_name(rate: float) -> str:
    """What stands behind the names of the figures at a rate."""
    return f"rate_{rate:g}"


def worst(estimates: list[Estimate]) -> Estimate:
    """The longest of several waits, bound by bound."""
    return Estimate(*(max(getattr(one, bound) for one in estimates) for bound in ("value", "low", "high")))
