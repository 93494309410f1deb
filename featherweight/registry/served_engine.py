"""A served folder's engine and tokenizer, as those keep them who answer from it: started anew after it failed.

What no answer will come of is refused before it is cut into tokens, which takes seconds for a text of megabytes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from numbers import Integral
from pathlib import Path
from typing import Any

from featherweight.checkpoint.tokenizer import load_tokenizer
from featherweight.errors import DataError, StageError, one_line
from featherweight.runtimes.client import Worker, open_worker
from featherweight.runtimes.interface import Limits

MOST_AT_ONCE = 10_000
"""Texts of one request: those of others wait until they are answered."""
MOST_CHARACTERS = 1_000_000
"""Of a text that is to be cut to what the model reads: a second of a tokenizer's time."""
KINDS: dict[type, str] = {Integral: "a whole number", bool: "true or false", str: "a name"}


class ServedEngine:
    """The engine's process, the tokenizer, and the limits that it is opened for."""

    def __init__(self, served: Path, limits: Limits) -> None:
        self.served, self.limits = served, limits
        self.max_tokens, self.max_batch = limits.max_tokens, limits.max_batch
        self._tokenizer: Any = load_tokenizer(served)
        # Four times, for what a tokenizer takes out of a text before it cuts it.
        self._most_characters = self.max_tokens * 4 * max(map(len, self._tokenizer.get_vocab()), default=1)
        self._starting = threading.Lock()
        self._worker: Worker | None = None

    def close(self) -> None:
        """Stop the engine."""
        self._close(self._worker)

    def _close(self, worker: Worker | None) -> None:
        """Stop one that may have been stopped, or followed by another, since it was asked."""
        with self._starting:
            if worker is not None and self._worker is worker:
                self._worker = None
                worker.close()

    def _require_few(self, asked: Sequence[Any]) -> None:
        """Raises DataError for more texts than are answered at once."""
        if len(asked) > MOST_AT_ONCE:
            raise DataError(f"{len(asked)} texts in one request; send at most {MOST_AT_ONCE} at once")

    def _require_text(self, *parts: str, cut: bool = False) -> None:
        """Raises DataError for what is no text, or cannot fit: no token is longer than the longest. cut: it is made to fit."""
        most = max(self._most_characters, MOST_CHARACTERS) if cut else self._most_characters
        length = sum(map(len, parts))
        if length > most:
            raise DataError(
                f"a text of {length} characters: this model is served with room for {self.max_tokens} tokens; give less"
            )
        if any("\ud800" <= character <= "\udfff" for part in parts for character in part):
            raise DataError("the text holds half of a surrogate pair, which is no character; leave it out")

    def _open(self) -> Worker:
        """The running engine; starts it where there is none."""
        with self._starting:
            if self._worker is None:
                self._worker = open_worker(self.served, *astuple(self.limits))
            return self._worker

    @contextmanager
    def _running(self) -> Iterator[Worker]:
        """The engine for a block; where that raises StageError it is stopped, and the next one starts it anew."""
        worker = self._open()
        try:
            yield worker
        except StageError:
            self._close(worker)
            raise


def require_kinds(**given: tuple[object, type]) -> None:
    """Raises DataError for a parameter that is not of its type; None is none. True is no whole number."""
    for name, (value, kind) in given.items():
        if value is not None and (not isinstance(value, kind) or (kind is Integral and isinstance(value, bool))):
            raise DataError(f"{name} is {KINDS[kind]}, not {one_line(repr(value), 60)}")
