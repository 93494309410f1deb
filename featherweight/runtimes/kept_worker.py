"""A worker that outlives the stage that opened it: the baseline's, beside which every variant of a run is measured.

Starting one costs seconds of imports, which tell nothing new: what a fresh process shows (load time, peak memory, quality) is
known from the first. Whoever runs the stages says how long one may live (`kept_workers`, `keep_workers`); where nobody does, as
in a stage that was sent to a process of its own, it ends with the stage. Between two stages it waits for its next call and
computes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from featherweight.progress import Progress
from featherweight.runtimes.client import Worker, open_worker
from featherweight.store.served_folder import Serving
from featherweight.system.device import CPU
from featherweight.system.machine import memory_bytes
from featherweight.system.processes import peak_bytes

MOST_MEMORY = 1 / 8
"""Of this machine's memory: a larger worker would take the room of the stages between. A GPU's is too dear to wait in."""

Asked = tuple[Path, int, int, int]


class Kept:
    """At most one waiting worker, and what it was opened for."""

    def __init__(self) -> None:
        self.worker: Worker | None = None
        self.asked: Asked | None = None

    def take(self, asked: Asked | None) -> Worker | None:
        """The worker, if it was opened for just that and still runs; any other is closed."""
        worker, self.worker = self.worker, None
        if worker is None or (asked == self.asked and worker.alive):
            return worker
        worker.close()
        return None

    def put(self, worker: Worker, asked: Asked) -> None:
        """Keep a worker that leaves room for the stages to come; any other is closed."""
        if worker.device == CPU and peak_bytes(worker.pid) <= MOST_MEMORY * memory_bytes():
            self.worker, self.asked = worker, asked
        else:
            worker.close()


_kept: ContextVar[Kept | None] = ContextVar("kept", default=None)


@contextmanager
def kept_workers() -> Iterator[None]:
    """A worker that `kept_worker` opens inside may live until the end of this, however that comes about."""
    kept = Kept()
    token = _kept.set(kept)
    try:
        yield
    finally:
        _kept.reset(token)
        kept.take(None)


def keep_workers() -> None:
    """The same until this process ends, at the end of whose input a worker ends too: for one that runs stages for others."""
    if _kept.get() is None:
        _kept.set(Kept())


@contextmanager
def kept_worker(
    served: Path, threads: int, max_tokens: int, max_batch: int, progress: Progress, *, fresh: bool
) -> Iterator[Worker]:
    """`open_worker`'s worker, or the one that was left by whoever asked for the same before; it is left in turn.

    fresh: what only a new process shows is to be measured too. One with which something failed is not kept.
    """
    kept, asked = _kept.get(), (served.resolve(), threads, max_tokens, max_batch)
    worker = kept.take(None if fresh else asked) if kept else None
    worker = worker or started(served, threads, max_tokens, max_batch, progress)
    try:
        yield worker
    except BaseException:
        worker.close()
        raise
    if kept is None:
        worker.close()
    else:
        kept.put(worker, asked)


def started(served: Path, threads: int, max_tokens: int, max_batch: int, progress: Progress) -> Worker:
    """`open_worker`'s, told of."""
    progress.note(f"starting {Serving.read(served).engine}")
    return open_worker(served, threads, max_tokens, max_batch)


def kept_cpu_s() -> float:
    """Processor time that the worker which is kept now has taken since it started."""
    kept = _kept.get()
    return kept.worker.cpu_s() if kept and kept.worker else 0.0
