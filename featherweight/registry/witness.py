"""A second place for the end of each history: a file beside the keys, which no one who writes to MLflow can write to."""

from __future__ import annotations

import json
from pathlib import Path

from featherweight.errors import IntegrityError
from featherweight.registry import shared_witness
from featherweight.registry.history import History
from featherweight.registry.keys import Keys
from featherweight.registry.versions import RegisteredModel, knows, mark
from featherweight.system.locks import locked_file

FILE = "witness.json"


def witness(model: RegisteredModel, keys: Keys) -> None:
    """Remember the last entry of a history: where a team's witness is named there, and beside keys of one's own."""
    if not model.history.entries or lost(model.born, model.history, keys):
        return  # what was seen before outlives what it was replaced by
    shared_witness.add(model.born, mark(model.history.entries[-1]), keys)
    if keys.private is None:
        return
    path = keys.folder / FILE
    with locked_file(path.with_name(f"{FILE}.lock")):
        seen = _read(path)
        part = path.with_name(f"{FILE}.part")
        part.write_text(json.dumps(seen | {str(model.born): mark(model.history.entries[-1])}, indent=1))
        part.replace(path)


def lost(born: int, history: History, keys: Keys) -> str:
    """Mark of the entry that this user or the team's witness saw last, where the history does not hold it; else ''."""
    seen = [_read(keys.folder / FILE).get(str(born), ""), *(one.mark for one in shared_witness.last(born, keys))]
    return next((one for one in seen if one and not any(knows(entry, one) for entry in history.entries)), "")


def seen_from_here(born: int, history: History, keys: Keys) -> int:
    """Number of the last entry that this user saw, 0 where none was seen or the history does not hold it."""
    seen = _read(keys.folder / FILE).get(str(born), "")
    return next((entry.number for entry in history.entries if seen and knows(entry, seen)), 0)


def witnessed_fault(born: int, history: History, keys: Keys) -> str:
    """What that means in words, '' where nothing is wrong."""
    number = lost(born, history, keys).partition(":")[0]
    return (
        f"history entry {number}, which was seen from here, is not there any more, or another: cut off or rewritten"
        if number
        else ""
    )


def _read(path: Path) -> dict[str, str]:
    """Marks by model. Raises IntegrityError where something else lies there: what was seen is not known then."""
    if not path.exists():
        return {}
    try:
        seen = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        seen = None
    if not isinstance(seen, dict) or not all(isinstance(mark, str) for mark in seen.values()):
        raise IntegrityError(f"{path} was altered: restore it, or remove it, and what was seen from here is not missed any more")
    return seen
