"""Arrivals: the checkpoints below a folder or an S3 prefix, a hub repository's revisions, a registered model's versions.

Where they are found stands with each kind of source, what one is in `arrival`. Here stands how all are looked at: one is taken when
it is complete and at rest, and it is known again by its content. Its content is read once; a note in the workspace remembers it as
long as nothing that the product reads was written since.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from featherweight.checkpoint.arrival import Arrival
from featherweight.checkpoint.hub import revisions
from featherweight.checkpoint.identity import content_identity
from featherweight.checkpoint.local_folder import folders_below
from featherweight.checkpoint.registered_model import versions
from featherweight.checkpoint.s3_prefix import prefixes_below
from featherweight.errors import CheckpointError, told

READERS = 4
State = Literal["ready", "waiting", "left out"]


@dataclass(frozen=True)
class Seen:
    """What a look found of an arrival. 'waiting' for what `reason` says; 'left out' is never taken; 'ready' has an identity."""

    arrival: Arrival
    state: State
    identity: str = ""
    reason: str = ""

    @property
    def source(self) -> str:
        """What a recipe's `checkpoint.source` takes."""
        return self.arrival.source


def arrivals(source: str) -> list[Arrival]:
    """What there is at or below `source`, sorted by name, complete or not; only listings are read.

    Raises DataError where a folder is missing, ServiceError where a server refuses or does not answer.
    """
    kinds = {"s3://": prefixes_below, "hf:": revisions, "models:": versions}
    find = next((kinds[kind] for kind in kinds if source.startswith(kind)), folders_below)
    one_file = source.endswith(".gguf") and find in (prefixes_below, folders_below)
    found = find(source.rpartition("/")[0] if one_file else source)
    return sorted((one for one in found if not one_file or one.source == source), key=lambda arrival: arrival.source)


def look(source: str, notes: Path, settle_s: float, take: Callable[[list[Arrival]], list[Arrival]] = list) -> list[Seen]:
    """Two looks, `settle_s` seconds apart where something is new; what is complete, at rest and taken gets its identity.

    notes: the folder that remembers identities. take: which of all that is there is taken at all.
    """
    first = take(arrivals(source))
    notes.mkdir(parents=True, exist_ok=True)
    new = [one for one in first if not one.problem and not _note(notes, one).exists()]
    if any(not one.fixed for one in new):
        time.sleep(settle_s)
    stamps = {one.source: one.stamp for one in first}
    again = take(arrivals(source)) if new else first
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda one: _seen(one, notes, stamps.get(one.source) == one.stamp), again))


def _seen(arrival: Arrival, notes: Path, at_rest: bool) -> Seen:
    """One arrival's state. Whatever its files hold costs it alone, so that nothing in them keeps others from being seen."""
    if arrival.problem:
        return Seen(arrival, "left out", reason=arrival.problem)
    note = _note(notes, arrival)
    if note.exists():
        return Seen(arrival, "ready", note.read_text())
    try:
        lacking = _lacking(arrival, at_rest)
        if lacking:
            return Seen(arrival, "waiting", reason=lacking)
        identity = _identity(arrival)
        if not _untouched(arrival):
            return Seen(arrival, "waiting", reason="it was written while it was read")
    except Exception as error:
        return Seen(arrival, "waiting", reason=told(error))
    part = Path(tempfile.mkstemp(dir=notes)[1])
    part.write_text(identity)
    part.replace(note)
    return Seen(arrival, "ready", identity)


def _lacking(arrival: Arrival, at_rest: bool) -> str | None:
    lacking = arrival.lacking(arrival.listing) if arrival.listing else None
    return lacking or (None if at_rest or arrival.fixed else "it is being written")


def _identity(arrival: Arrival) -> str:
    if arrival.identify is not None:
        return arrival.identify()
    if arrival.listing is None:
        raise CheckpointError(f"{arrival.source} has no files to know it by")
    return content_identity(arrival.listing)


def _untouched(arrival: Arrival) -> bool:
    """Whether it is as it was before its content was read; what has no listing is fixed by nature."""
    if arrival.listing is None:
        return True
    return any(one.source == arrival.source and one.stamp == arrival.stamp for one in arrivals(arrival.source))


def _note(notes: Path, arrival: Arrival) -> Path:
    return notes / arrival.stamp
