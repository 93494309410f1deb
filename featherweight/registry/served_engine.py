"""A served folder's engine, as those keep it who answer from it: started anew after it failed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from featherweight.errors import StageError
from featherweight.runtimes.client import Worker, open_worker
from featherweight.store.served_folder import verified_tokens


class ServedEngine:
    """The engine's process and the limits that it is opened for.

    max_tokens: the longest sequence; by default as many tokens as were verified. Whoever calls holds `_turn`.
    """

    def __init__(self, served: Path, threads: int, max_tokens: int | None, max_batch: int) -> None:
        self.served, self.threads, self.max_batch = served, threads, max_batch
        self.max_tokens = max_tokens or verified_tokens(served)
        self._turn = threading.Lock()
        self._worker: Worker | None = None

    def close(self) -> None:
        """Stop the engine."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _open(self) -> Worker:
        """The running engine; starts it where there is none."""
        if self._worker is None:
            self._worker = open_worker(self.served, self.threads, self.max_tokens, self.max_batch)
        return self._worker

    @contextmanager
    def _running(self) -> Iterator[Worker]:
        """The engine for a block; where that raises StageError it is stopped, and the next one starts it anew."""
        worker = self._open()
        try:
            yield worker
        except StageError:
            self.close()
            raise
