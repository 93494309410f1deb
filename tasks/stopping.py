"""Ctrl-C while stages run side by side: one whose processes were ended for it has not failed, and keeps what it resumes from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Event

_stop: ContextVar[Event | None] = ContextVar("stop", default=None)


@contextmanager
def heeding(stop: Event) -> Iterator[None]:
    """What is called inside was `stopped` once `stop` is set."""
    token = _stop.set(stop)
    try:
        yield
    finally:
        _stop.reset(token)


def stopped() -> bool:
    """Whether the run that this stage belongs to is being ended."""
    stop = _stop.get()
    return stop is not None and stop.is_set()
