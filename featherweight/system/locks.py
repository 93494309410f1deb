"""Locks among the processes of one machine, which the system takes back from a process that dies."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked_file(file: Path, shared: bool = False) -> Iterator[None]:
    """Run a block while no other process runs one with the same file, which is made and stays; waits for its turn.

    shared: others that say so too may run theirs beside it.
    """
    with file.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield


@contextmanager
def locked_if_free(file: Path) -> Iterator[bool]:
    """As `locked_file`, at once: what is yielded tells whether the lock was to be had."""
    with file.open("ab") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        yield free
