"""Numbers of threads: which are worth trying, and which was best. Two on too few cores can be fifty times slower than one."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping

from featherweight.system.machine import available_cores, physical_cores

Probe = dict[int, tuple[float, ...]]
"""Latencies in seconds, by number of threads."""
AS_GOOD = 1.03
"""Within this factor of the best latency a count of threads is as good, and the smaller one is taken."""
HOPELESS = 1.5
"""A count that is this many times slower than another is not tried again."""

NEAR = 1.2
"""Within this factor of the best latencies one count of threads for all is as good, where switching costs tens of seconds."""


def thread_counts(wanted: tuple[int, ...] | None, slow: bool) -> list[int]:
    """Counts to try: 1, 2, 4 ... and all cores, or only 1 and all where each costs tens of seconds.

    The last one stays loaded, so all cores come last: an engine that is slow to switch mostly has a use for them.
    """
    if wanted:
        return list(dict.fromkeys(wanted))
    cores = max(1, min(available_cores(), physical_cores()))
    return sorted({1, cores, *(() if slow else _powers(cores))})


def _powers(cores: int) -> Iterator[int]:
    """1, 2, 4 ... up to `cores`."""
    count = 1
    while count <= cores:
        yield count
        count *= 2


def best_latency_s(probe: Mapping[int, tuple[float, ...]]) -> float:
    """The shortest of all; infinite where nothing was tried."""
    return min((min(times) for times in probe.values()), default=math.inf)


def best_count(probe: Probe) -> int:
    """The number of threads with the best latency; of two within 3 % of it, the smaller."""
    best = best_latency_s(probe)
    return min(count for count, times in probe.items() if min(times) <= AS_GOOD * best)


def common_count(probes: Collection[Mapping[int, tuple[float, ...]]]) -> int | None:
    """The one number of threads that is near the best in each Probe; None where there is none."""
    tried = set[int].intersection(*map(set, probes)) if probes else set[int]()

    def behind(count: int) -> float:
        return max(min(probe[count]) / best_latency_s(probe) for probe in probes)

    nearest = min(sorted(tried), key=behind, default=None)
    return nearest if nearest is not None and behind(nearest) <= NEAR else None
