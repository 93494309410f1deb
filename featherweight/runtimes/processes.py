"""Processes: their memory, and their end."""

from __future__ import annotations

import contextlib
from pathlib import Path


def end_children(pid: int) -> None:
    """Kill every descendant of a process, as far as they still run."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def tree_peak_bytes(pid: int) -> int:
    """Sum of the peak resident sets of a process and its descendants; pages that they share are counted in each."""
    import psutil

    process = psutil.Process(pid)
    return sum(peak_bytes(one.pid) for one in (process, *process.children(recursive=True)))


def peak_bytes(pid: int) -> int:
    """Peak resident set of a process; its present one where the system keeps no peak, 0 if the process is gone.

    Not getrusage: that remembers the parent, from which the process was forked, as a peak of its own.
    """
    import psutil

    status = Path(f"/proc/{pid}/status")
    try:
        if not status.exists():
            return psutil.Process(pid).memory_info().rss
        peaks = [int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    except (OSError, psutil.NoSuchProcess):
        return 0
    return peaks[0] * 1024 if peaks else 0
