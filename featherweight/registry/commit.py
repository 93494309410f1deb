"""Deciding by one write, and completing what follows from it: the two loops that every writer runs, on any store.

A store has three operations, each atomic by itself: read everything, append an entry (the store numbers it), write one cell.
docs/decisions/history.md says why that is safe however writers interleave and wherever they stop.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import NamedTuple, Protocol, TypeVar

from featherweight.errors import ServiceError
from featherweight.registry.history import Entry, History, earlier_digest

ATTEMPTS = 60


class Cell(NamedTuple):
    """One thing that follows from the history.

    kind: 'alias', 'tag' (a version's stage in a tag), 'stage' (MLflow's own) or 'mark' (which entry was projected last).
    name: the alias, the version's number, or ''.
    """

    kind: str
    name: str

    @property
    def told(self) -> str:
        """The same in words."""
        words = {"alias": "alias {0}", "tag": "the stage tag of version {0}", "stage": "MLflow's stage of version {0}"}
        return words.get(self.kind, "the mark of the history's end").format(self.name)


class Seen(Protocol):
    """What a store held at one look. Its cells were read before its history, which so is never older than they."""

    @property
    def history(self) -> History:
        """What the stored entries amount to."""

    def behind(self) -> list[tuple[Cell, str | None]]:
        """The cells that are not what the history makes them, and what they have to be (None: absent), in the order to write."""


S = TypeVar("S", bound=Seen)
S_co = TypeVar("S_co", bound=Seen, covariant=True)


class Unsure(ServiceError):
    """A store failed while it appended an entry, which may be there or not."""


class Store(Protocol[S_co]):
    """Where the history of one registered model is kept."""

    def read(self) -> S_co:
        """Everything, as it stands."""

    def append(self, entry: Entry) -> None:
        """Store an entry under the next number. Raises Unsure where it may be stored or not."""

    def write(self, cell: Cell, value: str | None) -> None:
        """Set one cell, or remove it."""


Decide = Callable[[S], Entry | None]
"""What is to be done as things stand, None for nothing; raises to refuse."""


def _wait(attempt: int) -> None:
    time.sleep(random.uniform(0.01, 0.05 * (attempt + 1)))


def commit(store: Store[S], decide: Decide[S], wait: Callable[[int], None] = _wait) -> tuple[S, Entry | None]:
    """Append what `decide` says, and complete what follows from it; returns how things stand then, and the entry, if any.

    Where another entry came first, `decide` is asked again. Raises what it raises, ServiceError where the store keeps failing.
    """
    mine: Entry | None = None
    for attempt in range(ATTEMPTS):
        seen = store.read()
        done = seen.history.find(mine.id) if mine else None
        if done is not None:
            return complete(store, seen), done
        if mine is None or seen.history.head != mine.follows:
            draft = decide(seen)
            if draft is None:
                return complete(store, seen), None
            mine = placed(draft, seen.history)
        try:
            store.append(mine)
        except Unsure as error:
            reason = error
            wait(attempt)
    raise ServiceError(f"the history could not be written in {ATTEMPTS} attempts, nothing was decided ({reason})")


def placed(draft: Entry, history: History) -> Entry:
    """A draft at the end of a history, dated by this machine's clock, which decides nothing."""
    last = history.entries[-1] if history.entries else None
    when = datetime.now(UTC).isoformat(timespec="microseconds")
    earlier = "" if last else earlier_digest(history.earlier)
    before = last.digest if last else ""
    return replace(draft, id=uuid.uuid4().hex, when=when, follows=history.head, before=before, earlier=earlier)


def complete(store: Store[S], seen: S) -> S:
    """Write what is behind the history, until a look finds nothing that is; returns that look.

    Whoever wrote looks again afterwards, so that a writer that slept on an old look mends what it wrote.
    """
    for _ in range(ATTEMPTS):
        behind = seen.behind()
        if not behind:
            break
        for cell, value in behind:
            store.write(cell, value)
        seen = store.read()
    return seen
