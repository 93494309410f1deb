"""How much of the processors other programs take while something is timed.

Rounds taken in turns are slowed alike by what comes and goes, yet an engine of several threads that wait for one another loses far
more to a neighbour than one of a single thread: such a comparison is not what it would be on a quiet machine, and its confidence
interval, which knows the rounds alone, does not show it.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

BUSY_TIMES = ("user", "nice", "system", "irq", "softirq", "steal")
"""What the system counts as work, the hypervisor's for others too; `user` holds what guests take."""


@dataclass(frozen=True)
class ProcessorTimes:
    """Seconds until now. busy: of all programs, on the processors that this process may use. own: of this process and all below."""

    clock: float
    busy: float
    own: float
    processors: int

    @classmethod
    def read(cls) -> ProcessorTimes:
        """As they are now."""
        import psutil

        every = psutil.cpu_times(percpu=True)
        affinity = getattr(os, "sched_getaffinity", None)
        usable = affinity(0) if affinity else range(len(every))
        ours = [times for number, times in enumerate(every) if number in usable] or every
        busy = sum(getattr(times, name, 0.0) for times in ours for name in BUSY_TIMES)
        return cls(time.monotonic(), busy, _own_seconds(), len(ours))

    def others_since(self, before: ProcessorTimes) -> float:
        """The share of the processors' time since `before` that other programs took, 0 to 1."""
        wall = (self.clock - before.clock) * self.processors
        others = (self.busy - before.busy) - (self.own - before.own)
        return min(1.0, max(0.0, others / wall)) if wall > 0 else 0.0


def _own_seconds() -> float:
    """What this process, those it started and those that they did have taken, what has ended with them."""
    import psutil

    this, total = psutil.Process(), 0.0
    for process in (this, *this.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.Error:  # it has ended meanwhile
            continue
        total += times.user + times.system + getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
    return total
