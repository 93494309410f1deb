"""Processes: their memory, and their end."""

from __future__ import annotations

from pathlib import Path


def end_children(pid: int) -> None:
    """Kill every descendant of a process, as far as they still run."""
    import contextlib

    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def tree_peak_bytes(pid: int) -> int:
    """Sum of the peak resident sets of a process and its descendants; pages that they share are counted in each."""
    import psutil

    process = psutil.Process(pid)
    return sum(_peak_bytes(one.pid) for one in (process, *process.children(recursive=True)))


def _peak_bytes(pid: int) -> int:
    """VmHWM of a process, 0 if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    peaks = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")]
    return peaks[0] * 1024 if peaks else 0
