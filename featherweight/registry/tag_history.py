"""Histories as releases before kept them, in tags of the registered model beside aliases that were the truth: read, never written.

Each entry is one tag, its key ends in the digest of its content, and it names the one before it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from featherweight.errors import IntegrityError
from featherweight.registry.history import LINE_LIMIT, GateResult, Standing, Transition
from featherweight.store.artifact import content_digest

PREFIX = "featherweight.history."


def read(tags: Mapping[str, str]) -> tuple[list[Transition], list[str]]:
    """The readable entries among a registered model's tags, oldest first, and what does not hold together, in words."""
    entries, faults, seen = [], [], {""}
    for key in sorted(key for key in tags if key.startswith(PREFIX)):
        try:
            entry = _parse(key, tags[key])
        except IntegrityError as error:
            faults.append(str(error))
            continue
        id = _id(entry)
        if not key.endswith(id):
            faults.append(f"history entry {key} was altered: its content has digest {id}")
        if entry.before not in seen:
            faults.append(f"a history entry before {key} was removed or altered: {entry.before} is not there")
        seen.add(id)
        entries.append(entry)
    return entries, faults


def _parse(key: str, value: str) -> Transition:
    try:
        fields: dict[str, Any] = json.loads(value)
        fields["gates"] = tuple(GateResult(**gate) for gate in fields["gates"])
        return Transition(**fields)
    except (ValueError, TypeError, KeyError) as error:
        raise IntegrityError(f"history entry {key} is not readable; it was altered outside Featherweight") from error


def _id(entry: Transition) -> str:
    stored = {name: value for name, value in asdict(entry).items() if name != "number"}
    return content_digest(stored)[:16]


def standing(entries: Sequence[Transition], aliases: Mapping[str, str]) -> Standing:
    """Where all stood by a history in tags: by its aliases, since a promotion that was killed may have told more than it did."""
    champion, previous = aliases.get("champion", ""), aliases.get("previous", "")
    line = [version for version in _champions(entries) if version != champion]
    if previous in line:
        del line[line.index(previous) + 1 :]
    elif previous:
        line.append(previous)
    held = [champion] if champion else []
    return Standing(champion, aliases.get("challenger", ""), tuple([*line, *held][-LINE_LIMIT:]))


def _champions(entries: Sequence[Transition]) -> list[str]:
    """Versions that were champion, oldest first, without those that were rolled back."""
    stack: list[str] = []
    for entry in entries:
        if entry.target != "production":
            continue
        if entry.action == "rollback" and entry.version in stack:
            del stack[stack.index(entry.version) + 1 :]
        else:
            stack = [*(version for version in stack if version != entry.version), entry.version]
    return stack
