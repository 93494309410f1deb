"""Processes: the port they listen on, their memory, and their end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

WORKERS_PEAK = "workers_peak_memory_bytes"
"""The metric in which a stage in several processes tells of their memory, which its own process does not see."""
ENDS_WITH_PARENT = "FEATHERWEIGHT_ENDS_WITH_PARENT"
"""Set in the environment of processes that somebody else starts for us, and that are to end with who did."""
_PR_SET_PDEATHSIG = 1


@contextmanager
def held_port() -> Iterator[int]:
    """A TCP port that this machine gives to nobody else during the block, for a server that is started in it to listen on.

    Linux lets a server that says SO_REUSEADDR, as they all do, listen where we are bound and do not. Other systems do not, so
    that there the port is one that nobody listens on now.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        port = holder.getsockname()[1]
        if sys.platform != "linux":
            holder.close()
        yield port


def end_with_parent() -> Callable[[], object] | None:
    """A `preexec_fn` by which Linux ends a child when its parent ends, however that happens; None elsewhere."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def end_with_parent_where_told() -> None:
    """Let this process end with its parent where its environment says so; the parent is to have no say in it any more."""
    end = end_with_parent()
    if os.environ.get(ENDS_WITH_PARENT) and end is not None:
        end()


def end_group(leader: subprocess.Popen[bytes]) -> None:
    """End a process that leads its group, with all of the group: politely, then not."""
    for kind, patience_s in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        try:
            os.killpg(leader.pid, kind)
            leader.wait(patience_s)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    leader.wait()


class GroupWatch:
    """Kills the group of a process that leads one as soon as this process has ended, however that came about.

    What `end_with_parent` tells the leader alone, its own children do not hear: an engine that the leader has only just started
    would outlive both. A shell waits for the end of a pipe whose other end is here.
    """

    def __init__(self, leader: subprocess.Popen[bytes]) -> None:
        self.leader = leader
        command = ["sh", "-c", 'read -r _; kill -s KILL -- "-$1"', "sh", str(leader.pid)]
        bare = {"PATH": os.environ.get("PATH", os.defpath)}  # it has no use for what is secret in ours
        self._shell = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True, env=bare)

    def end(self) -> None:
        """End the group, politely first, and the watch with it."""
        end_group(self.leader)
        self._shell.kill()
        self._shell.communicate()


def end_children(pid: int) -> None:
    """Kill every descendant of a process, as far as they still run."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


@contextmanager
def highest(measure: Callable[[], int], every_s: float) -> Iterator[Callable[[], int]]:
    """Call `measure` in a thread every so often; what is yielded gives the largest answer so far."""
    found, done = [measure()], threading.Event()

    def watch() -> None:
        while not done.wait(every_s):
            found[0] = max(found[0], measure())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: found[0]
    finally:
        done.set()
        watcher.join()


def resident_bytes() -> int:
    """Resident set of this process now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


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


def host_and_pid() -> str:
    """This process as HOST:PID, which people read too; see `process_name` for one whose number comes again."""
    return f"{socket.gethostname()}:{os.getpid()}"


def has_ended(told: str) -> bool:
    """Whether a `host_and_pid()` is of this machine and there no more; of another machine nobody here knows."""
    host, _, pid = told.partition(":")
    return host == socket.gethostname() and pid.isdigit() and not Path(f"/proc/{pid}").exists()


def process_name() -> str:
    """This process, told so that any other on the machine can tell later whether it still runs."""
    return _name_of(os.getpid())


def is_running(name: str) -> bool | None:
    """Whether the process of a `process_name()` runs; None where it is of another machine or container: nobody here knows."""
    place, _, pid = name.rpartition("|")[0].rpartition("|")
    if place != _place():
        return None
    return pid.isdigit() and _name_of(int(pid)) == name


def _name_of(pid: int) -> str:
    """Machine and container, number, and the time at which it began, since numbers come again."""
    import psutil

    try:
        process = psutil.Process(pid)
        began = 0.0 if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        began = 0.0
    return f"{_place()}|{pid}|{began}"


def _place() -> str:
    """The machine, and where the system knows such, the container: process numbers mean nothing outside it."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()}|{namespace.readlink() if namespace.is_symlink() else ''}"
