"""What was decided about a registered model, and what came second."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from featherweight.registry.history import History, Transition
from featherweight.registry.out_of_band import OutOfBand, look, out_of_step
from featherweight.registry.registry import Registry
from featherweight.registry.versions import parse_reference
from featherweight.store.workspace import Workspace
from featherweight.system.user import user_name
from featherweight.visible import in_lines


@dataclass(frozen=True)
class ToldHistory:
    """The history of `model`. behind: what in MLflow does not follow it, in a line.

    moved: what somebody had moved in MLflow, where this look recorded it.
    """

    model: str
    history: History
    behind: str
    moved: OutOfBand | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form: transitions in order, where all stand, what lost against which entry, what does not hold together."""
        lost = [{**asdict(one.entry), "number": one.entry.number, "lost_to": one.winner.number} for one in self.history.lost]
        return {
            "model": self.model,
            "standing": asdict(self.history.standing),
            "transitions": [asdict(one) for one in self.history.transitions],
            "lost": lost,
            "faults": list(self.history.faults),
            "behind": self.behind,
            "out_of_band": asdict(self.moved) if self.moved else None,
        }

    def to_text(self) -> str:
        """A line for each transition, entry and gate, then what lost and what is wrong."""
        standing = self.history.standing
        held = {"champion": standing.champion, "challenger": standing.challenger, "previous": standing.previous}
        lines = [f"{self.model}: " + ", ".join(f"{name} {number or 'none'}" for name, number in held.items())]
        lines += [line for one in self.history.transitions for line in _transition(one)]
        lines += [f"{one.number:>4}  {one.when[:19]}Z  {one.told()}" for one in self.history.entries if not one.moves]
        lines += [f"lost to entry {one.winner.number}: {one.entry.told()}" for one in self.history.lost]
        lines += [self.moved.to_text()] if self.moved else []
        lines += [self.behind] if self.behind else []
        return in_lines([*lines, *(f"fault: {fault}" for fault in self.history.faults)])


def _transition(one: Transition) -> list[str]:
    entry = f"{one.number:>4}" if one.number else " tag"
    first = f"{entry}  {one.when[:19]}Z  version {one.version}: {one.source} → {one.target}  by {one.who}: {one.why}"
    return [first, *(f"        {'✓' if gate.passed else '✗'} {gate.gate}: {gate.reason}" for gate in one.gates)]


def history_of(workspace: Workspace, reference: str, repair: bool = False) -> ToldHistory:
    """The history of a registered model; nothing is changed, but where `repair` says so. Raises GateError where there is none.

    repair: where its end was cut off, let what is left count; aliases, tags and stages follow it.
    """
    registry = Registry(workspace.tracking_uri)
    registry.check()
    model, _ = parse_reference(reference, "champion")
    seen, moved = look(registry, model) if repair else (registry.model(model), None)
    if repair:  # after the look: what was moved is recorded before anything follows the history, and of a cut one after it
        registry.repair(model, user_name())
        seen, later = look(registry, model)
        moved = moved or later
    return ToldHistory(model, seen.history, out_of_step(seen), moved)
