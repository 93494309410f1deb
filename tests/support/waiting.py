"""Waiting for what comes without us, with a patience that only a defect exhausts, and processes that end while one looks."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TypeVar

import psutil

from featherweight.system.processes import _name_of

PATIENCE_S = 300.0
T = TypeVar("T")


def until(found: Callable[[], T], patience_s: float = PATIENCE_S) -> T:
    """What is found as soon as there is something."""
    deadline = time.monotonic() + patience_s
    while not (what := found()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)
    return what


def answers(port: int) -> bool:
    """Whether somebody listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def has_ended(process: psutil.Process) -> bool:
    """Whether a process runs no more, waited for by its parent or not."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def all_end(*processes: psutil.Process) -> bool:
    """Whether they all do, in good time."""
    return until(lambda: all(map(has_ended, processes)))


def running(program: str, of: psutil.Process | None = None) -> list[psutil.Process]:
    """The processes below this one, or another, that have those words in their command line."""
    found = []
    for one in (of or psutil.Process()).children(recursive=True):
        try:
            found += [one] if program in " ".join(one.cmdline()) else []
        except psutil.NoSuchProcess:  # it ended meanwhile
            continue
    return found


def name_of_ended() -> str:
    """The `process_name()` of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    name = _name_of(process.pid)
    process.communicate(b"\n")
    return name
