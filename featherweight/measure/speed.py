"""The speed of a served variant at requests of one shape: how many at once, how long their prompts, how long their answers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Shape:
    """Requests that are timed together. new_tokens: what each is answered with, which tells no two of them apart."""

    batch_size: int
    prompt_tokens: int
    new_tokens: int = field(compare=False)


@dataclass(frozen=True)
class Speed:
    """Timed generations of `batch_size` prompts of `prompt_tokens` to `new_tokens` new ones each, in seconds.

    total_s, ttft_s: round after round, `repeats` generations in each (a quick engine runs several in its turn).
    warmup_s: the first generation, with what the engine compiles for it. probe: what the thread counts that were tried took.
    energy_j: of each round, what the whole machine has used in it; empty where that is not readable.
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
    energy_j: tuple[float, ...] = ()

    @property
    def shape(self) -> Shape:
        """What was timed."""
        return Shape(self.batch_size, self.prompt_tokens, self.new_tokens)

    @property
    def rounds_s(self) -> list[float]:
        """One latency per round: the median of its generations."""
        return [median(times) for times in self.by_round(self.total_s)]

    @property
    def rounds_ttft_s(self) -> list[float]:
        """One time to first token per round."""
        return [median(times) for times in self.by_round(self.ttft_s)]

    def by_round(self, times: tuple[float, ...]) -> list[tuple[float, ...]]:
        """`total_s` or `ttft_s`, in rounds of `repeats`."""
        return [times[start : start + self.repeats] for start in range(0, len(times), self.repeats)]

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
    def joules_per_token(self) -> float | None:
        """Of the whole machine, for each new token; None where it is not readable."""
        tokens = len(self.total_s) * self.batch_size * self.new_tokens
        return sum(self.energy_j) / tokens if self.energy_j else None

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second, all sequences together, at the median latency."""
        return self.batch_size * self.new_tokens / median(self.total_s)

    @property
    def noise(self) -> float:
        """Spread of the rounds: largest less smallest, over the median."""
        return (max(self.rounds_s) - min(self.rounds_s)) / median(self.rounds_s)

    @property
    def figures(self) -> dict[str, float]:
        """Its flat figures."""
        latencies = {f"p{round(100 * share)}_latency_s": self.latency_s(share) for share in (0.5, 0.95, 0.99)}
        energy = {} if self.joules_per_token is None else {"joules_per_token": self.joules_per_token}
        return (
            latencies
            | energy
            | {
                "tokens_per_s": self.tokens_per_s,
                "inter_token_s": self.inter_token_s,
                "threads": self.threads,
                "warmup_s": self.warmup_s,
            }
        )

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Speed:
        """The inverse of `dataclasses.asdict` and a trip through JSON."""
        told: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in tree.items()}
        told["probe"] = {int(count): tuple(times) for count, times in tree["probe"].items()}
        return cls(**told)


def quantile(values: tuple[float, ...], share: float) -> float:
    """Linear interpolation between the ordered values, as numpy's default."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
