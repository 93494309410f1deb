"""Made-up comparisons of a variant with the baseline, for the tests of goals and statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from featherweight.measure.measurement import Comparison, Measurement, Quality, Speed


def speed(total_s: Sequence[float], ttft_s: Sequence[float] | None = None, batch_size: int = 1, **more: Any) -> Speed:
    """Rounds that took `total_s`, their first tokens a tenth of it."""
    total = tuple(total_s)
    return Speed(batch_size, 1, 16, 64, total, tuple(ttft_s or [value / 10 for value in total]), **more)


def measurement(
    latency_s: float = 1.0,
    nll: float = 100.0,
    size: int = 1000,
    memory: int = 5000,
    spread: float = 0.0,
    batches: Sequence[int] = (1, 8),
    eight: float = 1.0,
) -> Measurement:
    """A made-up variant: five rounds spread evenly around a latency, ten windows around a negative log-likelihood.

    eight: how many times longer eight prompts take it than one.
    """
    steps = (-1, -0.5, 0, 0.5, 1)
    quality = Quality(tuple(nll + window for window in range(10)), (50,) * 10, (200,) * 10)
    rounds = [latency_s * (1 + spread * step) for step in steps]
    slower = {1: 1.0, 8: eight}
    speeds = tuple(speed([slower[batch] * round_s for round_s in rounds], batch_size=batch) for batch in batches)
    return Measurement("torch", quality, speeds, memory, size, 1.0)


def comparison(**variant: Any) -> Comparison:
    """`measurement(**variant)` beside a baseline of 1 s."""
    return Comparison(measurement(**variant), measurement())
