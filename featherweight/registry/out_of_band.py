"""What was moved out of band: an alias or a stage that somebody set in MLflow.

It is seen at the next look, judged by the gate, recorded in the history, and undone or kept.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from featherweight.errors import Forbidden, one_line
from featherweight.registry.commit import Cell, Decide
from featherweight.registry.evidence import with_evidence
from featherweight.registry.gate import GatesRefused, judged
from featherweight.registry.history import WHY_LIMIT, Entry, GateResult
from featherweight.registry.keys import Keys
from featherweight.registry.registry import Registry
from featherweight.registry.smoke import smoked
from featherweight.registry.versions import CHALLENGER, CHAMPION, RegisteredModel
from featherweight.registry.witness import witnessed_fault
from featherweight.system.user import user_name

SETTLE_S = 1.0  # a writer that slept on an old look writes one stale cell, and mends it at once
CELLS = 20  # that an entry has room for
Wish = tuple[str, str]
"""What moving an alias amounts to: a version and the stage that it would have."""


@dataclass(frozen=True)
class OutOfBand:
    """What was found moved in MLflow, what became of it, and the entry that records it.

    outcome: 'undone', 'kept', 'left as it is', or 'taken back' where it was kept and did not answer. entry: 0 where none could be
    written.
    """

    model: str
    entry: int
    outcome: str
    why: str
    gates: tuple[GateResult, ...] = ()

    def to_text(self) -> str:
        """One line."""
        return f"out of band{f', entry {self.entry}' if self.entry else ''}: {self.why}"


def look(registry: Registry, model: str, settle_s: float = SETTLE_S) -> tuple[RegisteredModel, OutOfBand | None]:
    """A model as whoever decides looks at it: what was moved behind the history is recorded, and MLflow shows what that says.

    The last promotion's rule says what becomes of it: 'undo' it, 'keep' it where the gates let it pass, or only 'tell' of it.
    Nothing is written on a history that was cut off or altered, nor by whom MLflow lets read alone: that one is told how things
    should be. Raises GateError where there is no such model.
    """
    seen = registry.model(model)
    if witnessed_fault(seen.born, seen.history, Keys.here()):
        return seen, None
    moved = _lasting(registry, seen, settle_s) if seen.out_of_band() else {}
    try:
        if not moved:
            return (registry.settle(model) if seen.behind() else seen), None
        return _recorded(registry, registry.model(model), moved)
    except Forbidden:
        left = OutOfBand(model, 0, "left as it is", f"{_told(seen, moved)}; not recorded: no right to write") if moved else None
        return seen, left


def out_of_step(seen: RegisteredModel) -> str:
    """What MLflow shows otherwise than the history has it, in a line, for who looks and changes nothing; '' where all follows."""
    moved = seen.out_of_band()
    behind = [cell for cell, _ in seen.behind() if cell not in moved]
    told = [_told(seen, moved)] if moved else []
    told += [f"{len(behind)} aliases, tags and stages are behind the history"] if behind else []
    way = f"this look changes nothing, `featherweight audit {seen.model} --repair` does"
    return f"out of step: {', '.join(told)}; {way}" if told else ""


def _lasting(registry: Registry, seen: RegisteredModel, settle_s: float) -> dict[Cell, str | None]:
    """What is still moved a moment later."""
    time.sleep(settle_s)
    again = registry.model(seen.model).out_of_band()
    return {cell: value for cell, value in seen.out_of_band().items() if cell in again and again[cell] == value}


def _recorded(
    registry: Registry, seen: RegisteredModel, moved: Mapping[Cell, str | None]
) -> tuple[RegisteredModel, OutOfBand | None]:
    """Judge what was moved, append the entry, let MLflow follow; None where another look came first."""
    wish = _wish(seen, moved)
    gates, passed = _judged(registry, seen, wish)
    outcome = {"undo": "undone", "tell": "left as it is"}.get(seen.history.rule, "kept" if wish and passed else "undone")
    why = f"{_told(seen, moved)}; {outcome}" + ("" if passed else f", and the gate refuses it: {_refusal(gates)}")
    draft = _entry(seen, wish if outcome == "kept" else None, why[:WHY_LIMIT], gates)
    found = tuple((cell.kind, cell.name, value) for cell, value in list(moved.items())[:CELLS])
    draft = replace(draft, action="out of band", found=found, left=outcome == "left as it is")
    after = registry.decide(seen.model, _unless_decided(draft, seen.history.head))
    mine = next((one for one in after.history.entries if one.number > seen.history.head and one.found == found), None)
    if mine is None:
        return after, None
    told = OutOfBand(seen.model, mine.number, outcome, mine.why, mine.gates)
    return _asked(registry, after, wish[0], told) if wish and wish[1] == "production" and outcome == "kept" else (after, told)


def _asked(registry: Registry, seen: RegisteredModel, version: str, kept: OutOfBand) -> tuple[RegisteredModel, OutOfBand]:
    """A champion that is kept has to answer as a promoted one has; where it does not, the former is champion again."""
    if with_evidence(registry, seen.pick(version)).tag("smoke") != "asked":
        return seen, kept
    try:
        gate = smoked(registry, seen.pick(version), user_name())
    except GatesRefused as refused:
        why = f"{kept.why}; {one_line(refused)}"
        return registry.model(seen.model), replace(kept, outcome="taken back", why=why, gates=(*kept.gates, *refused.gates))
    return seen, replace(kept, gates=(*kept.gates, gate))


def _unless_decided(draft: Entry, head: int) -> Decide[RegisteredModel]:
    """Append a draft, unless anything was decided since it was made: the next look judges anew."""

    def decide(seen: RegisteredModel) -> Entry | None:
        seen.require_whole()
        return draft if seen.history.head == head else None

    return decide


def _entry(seen: RegisteredModel, wish: Wish | None, why: str, gates: tuple[GateResult, ...]) -> Entry:
    who = f"somebody in MLflow, seen by {user_name()}"
    if wish is None:
        return seen.told("out of band", who, why, gates)
    return seen.transition(seen.pick(wish[0]), wish[1], who, why, gates)


def _wish(seen: RegisteredModel, moved: Mapping[Cell, str | None]) -> Wish | None:
    """What somebody wanted who moved these, the champion's first; None for nothing that can be decided."""
    standing = seen.history.standing
    for kind, name, stage in (("alias", CHAMPION, "production"), ("alias", "production", "production")):
        version = moved.get(Cell(kind, name))
        if version in seen.versions and version != standing.champion:
            return str(version), stage
    for cell, value in moved.items():
        if cell.kind == "stage" and value == "Production" and cell.name != standing.champion:
            return cell.name, "production"
    if Cell("alias", CHAMPION) in moved and moved[Cell("alias", CHAMPION)] is None and standing.champion in seen.versions:
        return standing.champion, "archived"
    return _lower_wish(seen, moved)


def _lower_wish(seen: RegisteredModel, moved: Mapping[Cell, str | None]) -> Wish | None:
    """The same of the challenger, and of MLflow's other stages."""
    held = seen.history.standing.challenger
    for name in (CHALLENGER, "staging"):
        version = moved.get(Cell("alias", name), "")
        if version in seen.versions and version != held:
            return str(version), "staging"
        if version is None and held in seen.versions:
            return held, "none"
    return next(((cell.name, str(value).lower()) for cell, value in moved.items() if cell.kind == "stage"), None)


def _judged(registry: Registry, seen: RegisteredModel, wish: Wish | None) -> tuple[tuple[GateResult, ...], bool]:
    """What the gates say of a wish, on the way to production, and whether they let it pass."""
    if wish is None or wish[1] != "production":
        return (), True
    try:
        return tuple(judged(registry, seen.pick(wish[0]), seen.holder(CHAMPION))), True
    except GatesRefused as refused:
        return refused.gates, False


def _refusal(gates: tuple[GateResult, ...]) -> str:
    return "; ".join(f"{gate.gate}: {gate.reason}" for gate in gates if not gate.passed)


def _told(seen: RegisteredModel, moved: Mapping[Cell, str | None]) -> str:
    """What was moved, from where to where."""
    wanted = dict(seen.behind()) if seen.history.entries else {}
    lines = [f"{cell.told} went from {wanted.get(cell) or 'nothing'} to {value or 'nothing'}" for cell, value in moved.items()]
    more = f" and {len(lines) - CELLS} more" if len(lines) > CELLS else ""
    return ", ".join(lines[:CELLS]) + more
