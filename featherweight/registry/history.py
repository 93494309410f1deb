"""The history of a registered model: transitions that are appended and never rewritten.

An entry is one tag of the registered model, because tags are the one thing that every MLflow store (SQLite, PostgreSQL, a
remote server) writes atomically without an artifact store, and that outlives a deleted version. Its key ends in the digest of
its content, so that two writers never take the same key, where a running number would let the second silently replace the
first. Each entry names the one before it: an entry altered or removed by hand is found by `faults`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from featherweight.errors import GateError, IntegrityError
from featherweight.store.artifact import content_digest

PREFIX = "featherweight.history."
STAGES = ("none", "staging", "production", "archived")
ENTRY_LIMIT = 5000  # characters that a registered model's tag holds on PostgreSQL
WHY_LIMIT = 1000

StageName = Literal["none", "staging", "production", "archived"]
Action = Literal["transition", "displaced", "rollback"]


@dataclass(frozen=True)
class GateResult:
    """One gate's verdict: the number that was judged, the bound it had to keep, and the reason in words."""

    gate: str
    passed: bool
    reason: str
    value: float | None = None
    bound: float | None = None


@dataclass(frozen=True)
class Transition:
    """One entry: `who` moved `version` from stage `source` to stage `target` at `when` (UTC, ISO 8601), and why.

    action: 'displaced' where another version took the place, 'rollback' where the champion before came back.
    before: id of the entry before this one, empty for the first.
    """

    when: str
    who: str
    why: str
    action: Action
    version: str
    digest: str
    source: str
    target: str
    gates: tuple[GateResult, ...] = ()
    before: str = ""

    @property
    def id(self) -> str:
        """Digest of the entry's content."""
        return content_digest(asdict(self))[:16]

    def as_tag(self) -> tuple[str, str]:
        """Key and value of the tag that stores the entry."""
        value = json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":"))
        if len(value) > ENTRY_LIMIT:
            raise GateError(f"history entry of {len(value)} characters, at most {ENTRY_LIMIT}; shorten the reason")
        return f"{PREFIX}{self.when}.{self.id}".replace(":", "").replace("+0000", "Z"), value


def read(tags: Mapping[str, str]) -> list[Transition]:
    """The entries among a registered model's tags, oldest first. Raises IntegrityError for one that cannot be read."""
    return [_parse(key, tags[key]) for key in sorted(tags) if key.startswith(PREFIX)]


def _parse(key: str, value: str) -> Transition:
    try:
        fields: dict[str, Any] = json.loads(value)
        fields["gates"] = tuple(GateResult(**gate) for gate in fields["gates"])
        return Transition(**fields)
    except (ValueError, TypeError, KeyError) as error:
        raise IntegrityError(f"history entry {key} is not readable; it was altered outside Featherweight") from error


def follow(entry: Transition, history: Sequence[Transition]) -> Transition:
    """`entry` dated now and chained to the end of `history`; later than it whatever this machine's clock says."""
    now = datetime.now(UTC)
    if history:
        now = max(now, datetime.fromisoformat(history[-1].when) + timedelta(microseconds=1))
    return replace(entry, when=now.isoformat(timespec="microseconds"), before=history[-1].id if history else "")


def faults(tags: Mapping[str, str]) -> list[str]:
    """What does not hold together, in words: entries altered after they were written, entries removed. Empty when sound."""
    found, seen = [], {""}
    for key in sorted(key for key in tags if key.startswith(PREFIX)):
        try:
            entry = _parse(key, tags[key])
        except IntegrityError as error:
            found.append(str(error))
            continue
        if not key.endswith(entry.id):
            found.append(f"history entry {key} was altered: its content has digest {entry.id}")
        if entry.before not in seen:
            found.append(f"a history entry before {key} was removed or altered: {entry.before} is not there")
        seen.add(entry.id)
    return found


def champions(history: Sequence[Transition]) -> list[str]:
    """Versions that were champion, oldest first, without those that were rolled back; the present one is last."""
    stack: list[str] = []
    for entry in history:
        if entry.target != "production":
            continue
        if entry.action == "rollback" and entry.version in stack:
            del stack[stack.index(entry.version) + 1 :]
        else:
            stack = [*(version for version in stack if version != entry.version), entry.version]
    return stack
