"""Figures as people read them: ratios, changes, times, sizes, rates."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from featherweight.report.result import VariantRow

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


def milliseconds(seconds: float) -> str:
    """A time in ms, three significant digits."""
    if not math.isfinite(seconds):
        return MISSING
    value = seconds * 1000
    return f"{value:.2f} ms" if value < 10 else f"{value:.1f} ms" if value < 100 else f"{value:.0f} ms"


def mebibytes(size: float) -> str:
    """A size in MiB."""
    return MISSING if not math.isfinite(size) else f"{size / 2**20:.1f} MiB" if size < 2**30 else f"{size / 2**30:.2f} GiB"


def rate(tokens_per_s: float) -> str:
    """Tokens per second, without decimals that the noise would hide."""
    return MISSING if not math.isfinite(tokens_per_s) else f"{tokens_per_s:.0f}" if tokens_per_s >= 10 else f"{tokens_per_s:.1f}"


def loss_with_interval(row: VariantRow) -> str:
    """Quality change with its 95 % confidence interval, where there is one."""
    low, high = row.get("quality_change_low"), row.get("quality_change_high")
    interval = f" [{_bare(low)}, {_bare(high)}]" if math.isfinite(low) and math.isfinite(high) else ""
    return percent(row.get("quality_change")) + interval


def _bare(fraction: float) -> str:
    return percent(fraction).removesuffix(" %")
