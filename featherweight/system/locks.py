"""Locks among the processes of one machine, which the system takes back from a process that dies."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked_file(file: Path) -> Iterator[None]:
    """Run a block while no other process runs one with the same file, which is made and stays; waits for its turn."""
    with file.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
