"""Figures as people read them: ratios, changes, times, sizes, rates."""

from __future__ import annotations

import math
from collections.abc import Callable

from featherweight.measure.statistics import Estimate

MISSING = "–"


def times(ratio: float) -> str:
    """A ratio as '14.7x'."""
    return MISSING if not math.isfinite(ratio) else f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.1f}x"


def percent(fraction: float) -> str:
    """A signed change as '+0.11 %'."""
    if not math.isfinite(fraction):
        return MISSING
    digits = 2 if abs(fraction) < 0.0995 else 1 if abs(fraction) < 0.995 else 0
    return f"{fraction * 100:+.{digits}f} %".replace("-", "−")


def share(fraction: float) -> str:
    """A part of a whole as '12.5 %'."""
    return percent(fraction).removeprefix("+")


def points(value: float) -> str:
    """Points of 100 as '27.31'."""
    return f"{value:.2f}".replace("-", "−") if math.isfinite(value) else MISSING


def milliseconds(seconds: float) -> str:
    """A time in ms, three significant digits."""
    if not math.isfinite(seconds):
        return MISSING
    value = seconds * 1000
    return f"{value:.2f} ms" if value < 10 else f"{value:.1f} ms" if value < 100 else f"{value:.0f} ms"


def seconds(value: float) -> str:
    """A time in s, three significant digits."""
    return f"{value:.3g} s" if math.isfinite(value) else MISSING


def mebibytes(size: float) -> str:
    """A size in MiB, from 1024 of them on in GiB; below one with three digits."""
    if not math.isfinite(size):
        return MISSING
    return f"{size / 2**20:.3g} MiB" if size < 2**20 else f"{size / 2**20:.1f} MiB" if size < 2**30 else f"{size / 2**30:.2f} GiB"


def rate(tokens_per_s: float) -> str:
    """Tokens per second, without decimals that the noise would hide."""
    return MISSING if not math.isfinite(tokens_per_s) else f"{tokens_per_s:.0f}" if tokens_per_s >= 10 else f"{tokens_per_s:.1f}"


def plain(value: float) -> str:
    """A number without a unit, four significant digits."""
    return f"{value:.4g}" if math.isfinite(value) else MISSING


def with_interval(estimate: Estimate, show: Callable[[float], str] = plain) -> str:
    """An estimate with its confidence interval, '8.00x [7.50, 8.50]', where it has one; `show` writes each number."""
    low, high = estimate.low, estimate.high
    if low == high or not math.isfinite(low) or not math.isfinite(high):
        return show(estimate.value)
    return f"{show(estimate.value)} [{_bare(show(low))}, {_bare(show(high))}]"


def _bare(text: str) -> str:
    """A figure without its unit."""
    return text.removesuffix(" %").removesuffix("x").removesuffix(" ms")
