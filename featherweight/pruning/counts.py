"""How many units stay: LLM-Pruner's counts, moved to numbers that kernels and quantization grids like."""

from __future__ import annotations


def kept_groups(groups: int, head_dim: int, ratio: float) -> int:
    """Key/value groups that stay: LLM-Pruner counts channels to remove and rounds down to whole heads. At least one."""
    channels = groups * head_dim
    return max(1, groups - (channels - int(channels * (1 - ratio))) // head_dim)


def kept_channels(channels: int, ratio: float) -> int:
    """Channels that stay: LLM-Pruner's count, moved to the nearest multiple that kernels and 32-wide grids like."""
    return nearest(int(channels * (1 - ratio)), channels)


def nearest(kept: int, channels: int) -> int:
    """The multiple nearest to `kept` of `channels`, at least one multiple and at most all channels.

    The multiple is 32, or less for narrow layers, where 32 would move the count by more than a thirty-second of the width.
    """
    multiple = 32
    while multiple > 1 and multiple > channels // 16:
        multiple //= 2
    return min(channels, max(multiple, multiple * ((2 * kept + multiple) // (2 * multiple))))
