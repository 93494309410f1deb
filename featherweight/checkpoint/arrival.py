"""What a checkpoint is that may have arrived, whatever kind of source it is found at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from featherweight.checkpoint.files import Listing, missing_part

DEPTH = 4
"""So far below a folder or a prefix checkpoints are looked for."""
DONE = ("trainer_state.json", "_SUCCESS", "DONE", ".done", "done.txt")
"""What trainers and uploaders write last: transformers' Trainer its state, Hadoop and Spark `_SUCCESS`, scripts the others."""


@dataclass(frozen=True)
class Arrival:
    """A checkpoint that may have arrived.

    source: what a recipe's `checkpoint.source` takes. stamp: changes whenever a file that the product may read was written.
    listing: its files; None where they are not seen from here. problem: why it is never taken from here. fixed: nobody writes to
    it, by its nature or by its trainer's word. lacking: what is still missing. identify: the digest of its content.
    """

    source: str
    stamp: str
    listing: Listing | None = None
    problem: str | None = None
    fixed: bool = False
    lacking: Callable[[Listing], str | None] = missing_part
    identify: Callable[[], str] | None = None


def is_done(names: Sequence[str]) -> bool:
    """Whether the trainer says that it has written all."""
    return any(mark in names for mark in DONE)
