"""The history of a registered model: what was decided, in the order in which MLflow numbered it. Pure values, no MLflow.

An entry is written once, under a number that the server assigns, and names the number of the entry that it follows. An entry
counts where it follows the one that counted last; of two that follow the same one the later-numbered lost. So one write
decides, whoever else writes, and everything else (aliases, tags, stages) is computed from what counts: docs/decisions/history.md.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from functools import cached_property
from types import NoneType
from typing import Any, Literal, get_args

from featherweight.errors import GateError, IntegrityError
from featherweight.store.artifact import content_digest

ENTRY_LIMIT = 5000  # characters that a tag holds on PostgreSQL under every MLflow that we know
WHY_LIMIT = 1000
GAP = 1000
LINE_LIMIT = 50  # champions that a rollback can go back to

StageName = Literal["none", "staging", "production", "archived"]
Action = Literal["transition", "displaced", "rollback", "repair", "out of band"]
Rule = Literal["undo", "keep", "tell"]
STAGES: tuple[StageName, ...] = get_args(StageName)
WORDS = ("id", "before", "when", "who", "why", "action", "earlier", "mends", "rule")
"""The parts of an entry that are texts."""


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
    """What an entry means for one version: `who` moved it from stage `source` to stage `target` at `when` (UTC), and why.

    action: 'displaced' where another version took the place, 'rollback' where the champion before came back.
    before: digest of the entry before the one that it stands in, empty for the first. number: that of its entry, 0 in
    histories of earlier releases.
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
    number: int = 0


@dataclass(frozen=True)
class Move:
    """One version's part in an entry. digest: of the artifact that it serves."""

    version: str
    digest: str
    source: str
    target: str


@dataclass(frozen=True)
class Standing:
    """Who is champion and challenger, '' for nobody, and `line`: the champions that were not rolled back, the present one last."""

    champion: str = ""
    challenger: str = ""
    line: tuple[str, ...] = ()

    @property
    def previous(self) -> str:
        """The champion that a rollback goes back to, '' where there is none."""
        return next((version for version in reversed(self.line) if version != self.champion), "")

    def stage(self, version: str) -> StageName | None:
        """The stage of whoever holds one, None for all others."""
        held: Mapping[str, StageName] = {self.challenger: "staging", self.champion: "production"}
        return held.get(version) if version else None

    def moved(self, version: str, to: str) -> tuple[Standing, dict[str, str]]:
        """The standing once a version has moved to a stage, and the stage of every version that moves with it."""
        left = replace(self, challenger="" if version == self.challenger else self.challenger)
        if version == self.champion and to != "production":
            left = replace(left, champion="", line=tuple(one for one in self.line if one != version))
        if to == "staging":
            displaced = {left.challenger: "none"} if left.challenger else {}
            return replace(left, challenger=version), {version: to, **displaced}
        if to != "production":
            return left, {version: to}
        displaced = {self.champion: "archived"} if self.champion else {}
        line = (*(one for one in self.line if one != version), version)[-LINE_LIMIT:]
        return replace(left, champion=version, line=line), {version: to, **displaced}

    def rolled_back(self) -> tuple[Standing, dict[str, str]]:
        """The standing once `previous` is champion again, and who moves. There has to be a previous one."""
        back = self.previous
        gone = {self.champion: "archived"} if self.champion else {}
        challenger = "" if self.challenger == back else self.challenger
        line = self.line[: self.line.index(back) + 1]
        return Standing(back, challenger, line), {**gone, back: "production"}


@dataclass(frozen=True)
class Entry:
    """One decision, as it is stored.

    id: drawn at random by the writer, so that it finds its own entry again, and a write that a network repeated is no second one.
    model: creation time of the registered model (ms), which tells it from one of the same name that was deleted.
    follows: number of the entry that it follows, 0 for the first. before: that entry's digest.
    after: where all stand once it counts. earlier: for the first entry, digest of the history that tags kept before.
    mends: of a repair, the mark of the entry that is given up. number: what the server assigned, not stored.
    rule: what becomes of aliases that are moved out of band from here on, '' for as before. found: of an out-of-band entry, what
    was moved, as (kind, name, value) of its cells; left: whether it stays as it was found.
    """

    id: str
    model: int
    follows: int
    before: str
    when: str
    who: str
    why: str
    action: Action
    moves: tuple[Move, ...]
    after: Standing
    gates: tuple[GateResult, ...] = ()
    earlier: str = ""
    mends: str = ""
    rule: str = ""
    found: tuple[tuple[str, str, str | None], ...] = ()
    left: bool = False
    number: int = field(default=0, compare=False)

    @cached_property
    def digest(self) -> str:
        """sha256 of what is stored."""
        return content_digest(self._stored())

    def to_json(self) -> str:
        """The stored form. Raises GateError where it is longer than a tag may be."""
        text = json.dumps(self._stored(), ensure_ascii=False, separators=(",", ":"))
        if len(text) > ENTRY_LIMIT:
            raise GateError(f"history entry of {len(text)} characters, at most {ENTRY_LIMIT}; shorten the reason")
        return text

    def _stored(self) -> dict[str, Any]:
        later = {"rule", "found", "left"}  # entries of before these were there keep their digests
        return {name: value for name, value in asdict(self).items() if name != "number" and (value or name not in later)}

    @classmethod
    def from_json(cls, text: str, number: int) -> Entry:
        """Read the stored form. Raises IntegrityError where it is none."""
        try:
            fields: dict[str, Any] = json.loads(text)
            fields["moves"] = tuple(Move(**move) for move in fields["moves"])
            fields["gates"] = tuple(GateResult(**gate) for gate in fields["gates"])
            fields["found"] = tuple((kind, name, value) for kind, name, value in fields.get("found", ()))
            after = fields["after"]
            _require_kinds(fields, after)
            fields["after"] = Standing(after["champion"], after["challenger"], tuple(map(str, after["line"])))
            return cls(**fields | {"number": number, "follows": int(fields["follows"]), "model": int(fields["model"])})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise IntegrityError(f"history entry {number} is not readable; it was altered outside Featherweight") from error

    @property
    def transitions(self) -> tuple[Transition, ...]:
        """The entry version by version; only who was moved on purpose carries the gates."""
        return tuple(self._transition(move, first=place == 0) for place, move in enumerate(self.moves))

    def _transition(self, move: Move, first: bool) -> Transition:
        told = asdict(move) | {"when": self.when, "who": self.who, "before": self.before, "number": self.number}
        if first or self.action == "rollback":
            return Transition(**told, why=self.why, action=self.action, gates=self.gates if first else ())
        return Transition(**told, why=f"displaced by version {self.moves[0].version}", action="displaced")

    def told(self) -> str:
        """The entry in a few words."""
        if not self.moves:
            return f"{self.action}, by {self.who}: {self.why}"
        moved = next((move for move in self.moves if move.target == "production"), self.moves[0])
        way = "went back to" if self.action == "rollback" else "went to"
        return f"version {moved.version} {way} {moved.target}, by {self.who}: {self.why}"


@dataclass(frozen=True)
class Lost:
    """An entry that does not count, because `winner` followed the same entry with an earlier number."""

    entry: Entry
    winner: Entry


@dataclass(frozen=True)
class History:
    """What the stored entries amount to.

    entries: those that count, in order. lost: those that came second. stages: of every version that ever moved.
    faults: what does not hold together, in words. earlier: the transitions that tags kept before. begun: where all stood by them.
    """

    entries: tuple[Entry, ...] = ()
    lost: tuple[Lost, ...] = ()
    standing: Standing = Standing()
    stages: Mapping[str, str] = field(default_factory=dict)
    faults: tuple[str, ...] = ()
    earlier: tuple[Transition, ...] = ()
    begun: Standing = Standing()

    @property
    def head(self) -> int:
        """Number of the last entry that counts, 0 where there is none."""
        return self.entries[-1].number if self.entries else 0

    @property
    def transitions(self) -> list[Transition]:
        """Every transition, oldest first."""
        return [*self.earlier, *(transition for entry in self.entries for transition in entry.transitions)]

    def stage(self, version: str) -> str:
        """Where a version stands."""
        last = self.stages.get(version, "none")
        return self.standing.stage(version) or {"production": "archived", "staging": "none"}.get(last, last)

    @property
    def rule(self) -> Rule:
        """What becomes of aliases that are moved out of band: what the last entry that says so says."""
        said = [rule for entry in self.entries for rule in get_args(Rule) if entry.rule == rule]
        return said[-1] if said else "undo"

    def until(self, number: int) -> History:
        """The history as it was once the entry of that number counted; 0 for before all."""
        entries = tuple(entry for entry in self.entries if entry.number <= number)
        standing = entries[-1].after if entries else self.begun
        return replace(self, entries=entries, standing=standing, stages=_stages(self.earlier, entries))

    def find(self, id: str) -> Entry | None:
        """The entry of that id, where it counts."""
        return next((entry for entry in self.entries if entry.id == id), None)


def fold(stored: Mapping[int, str], model: int, earlier: Sequence[Transition] = (), standing: Standing = Standing()) -> History:
    """The history of the model that was created at `model`, of all that is stored: texts of entries by number.

    earlier, standing: what the tags of earlier releases tell, and where all stood by them, until a first entry says.
    A number that is missing or not readable is a fault and stops nothing: who followed it saw it count.
    """
    found, faults = _parsed(stored)
    gone = {entry.follows for entry in found.values() if entry.model == model} - found.keys() - {0}
    counted: list[Entry] = []
    lost: list[Lost] = []
    last = 0
    for number in sorted(found.keys() | gone):
        entry = found.get(number)
        if entry is None:  # whoever followed it saw it count
            last = number
        elif entry.model == model and entry.follows == last:
            faults += _chained(entry, counted, earlier)
            counted.append(entry)
            last = number
        elif entry.model == model:
            winner = next((one for one in counted if one.number > entry.follows), None)
            if winner is None or entry.follows > last:
                faults.append(f"history entry {number} follows {entry.follows}, which does not count")
            elif entry.id != winner.id:
                lost.append(Lost(entry, winner))
    now = counted[-1].after if counted else standing
    return History(tuple(counted), tuple(lost), now, _stages(earlier, counted), tuple(faults), tuple(earlier), standing)


def _stages(earlier: Sequence[Transition], counted: Sequence[Entry]) -> dict[str, str]:
    """The stage that each version that ever moved went to last."""
    stages = {one.version: one.target for one in earlier}
    return stages | {move.version: move.target for entry in counted for move in entry.moves}


def _require_kinds(fields: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Raises TypeError where an entry's parts are of other types than were written: whoever reads on would stumble over them."""
    moved = [text for move in fields["moves"] for text in astuple(move)]
    judged = [text for gate in fields["gates"] for text in (gate.gate, gate.reason)]
    moved_by_hand = [text for kind, name, _ in fields["found"] for text in (kind, name)]
    words = [fields.get(name, "") for name in WORDS]
    texts = [*words, after["champion"], after["challenger"], *moved, *judged, *moved_by_hand]
    figures = [figure for gate in fields["gates"] for figure in (gate.value, gate.bound)]
    cells = [value for _, _, value in fields["found"]]
    kinds: tuple[tuple[list[Any], tuple[type, ...]], ...] = (
        (texts, (str,)),
        (figures, (int, float, NoneType)),
        (cells, (str, NoneType)),
    )
    if not isinstance(after["line"], list) or not all(isinstance(one, kind) for values, kind in kinds for one in values):
        raise TypeError("a part is of another type")


def _parsed(stored: Mapping[int, str]) -> tuple[dict[int, Entry], list[str]]:
    """The readable entries by number, in order, and what is said of the others."""
    found, faults, last = {}, [], 0
    for number in sorted(stored):
        faults += _deleted(last + 1, number)
        last = number
        try:
            found[number] = Entry.from_json(stored[number], number)
        except IntegrityError as error:
            faults.append(str(error))
    return found, faults


def _deleted(first: int, end: int) -> list[str]:
    """What is said of the numbers from `first` to before `end`: each by itself, unless a row was given some huge one."""
    if end - first > GAP:
        return [f"history entries {first} to {end - 1} were deleted"]
    return [f"history entry {number} was deleted" for number in range(first, end)]


def _chained(entry: Entry, counted: Sequence[Entry], earlier: Sequence[Transition]) -> list[str]:
    """What is wrong between an entry and the one that it follows."""
    if not counted and not entry.follows:
        if entry.earlier == earlier_digest(earlier):
            return []
        return [f"the history that tags kept before entry {entry.number} was altered, or a part of it removed"]
    if counted and entry.follows == counted[-1].number and entry.before == counted[-1].digest:
        return []
    return [f"history entry {entry.follows} was altered or removed: entry {entry.number}, which follows it, knew another"]


def earlier_digest(earlier: Sequence[Transition]) -> str:
    """Digest of a history that tags kept, '' for none."""
    return content_digest([asdict(one) for one in earlier]) if earlier else ""
