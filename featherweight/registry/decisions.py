"""What a promotion or a rollback decides as things stand, asked again whenever another came first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from featherweight.errors import GateError
from featherweight.registry.commit import Decide
from featherweight.registry.history import Entry, GateResult
from featherweight.registry.versions import CHAMPION, PREVIOUS, RegisteredModel

APPROVAL = "approval"


def transition_decision(
    version: str, to: str, who: str, why: str, gates: Sequence[GateResult], expect_champion: str | None, rule: str = ""
) -> Decide[RegisteredModel]:
    """Move a version (its number) to a stage, unless it stands there; refuse where the champion is not the expected one."""

    def decide(seen: RegisteredModel) -> Entry | None:
        seen.require_whole()
        moved, champion = seen.pick(version), seen.holder(CHAMPION)
        if expect_champion is not None and (champion.version if champion else "") != expect_champion:
            raise GateError(_overtaken(seen, "promote again"))
        return None if moved.stage == to else seen.transition(moved, to, who, why, gates, rule)

    return decide


def rollback_decision(who: str, why: str) -> Decide[RegisteredModel]:
    """Go back from the champion of the first look; refuse where it is another meanwhile."""
    begun: list[str] = []

    def decide(seen: RegisteredModel) -> Entry | None:
        seen.require_whole()
        begun.append(seen.history.standing.champion)
        if begun[-1] != begun[0]:
            raise GateError(_overtaken(seen, "roll back again if that is still wanted"))
        return seen.rollback(who, why)

    return decide


def withdrawal_decision(version: str, who: str, why: str, gates: Sequence[GateResult]) -> Decide[RegisteredModel]:
    """Take a champion back: the former one is champion again, or nobody; nothing where another one is champion meanwhile."""

    def decide(seen: RegisteredModel) -> Entry | None:
        seen.require_whole()
        if seen.history.standing.champion != version:
            return None
        back = seen.holder(PREVIOUS) is not None
        entry = seen.rollback(who, why) if back else seen.transition(seen.pick(version), "archived", who, why, ())
        return replace(entry, gates=tuple(gates))

    return decide


def refusal_decision(version: str, who: str, why: str) -> Decide[RegisteredModel]:
    """A person refuses a version: it goes back to none, and the history says so, also where it stood there. No champion."""

    def decide(seen: RegisteredModel) -> Entry | None:
        seen.require_whole()
        moved = seen.pick(version)
        if moved.stage == "production":
            raise GateError(f"version {moved.version} of '{seen.model}' is in production already; roll back instead")
        return seen.transition(moved, "none", who, why, (GateResult(APPROVAL, False, f"refused by {who}: {why}"),))

    return decide


def _overtaken(seen: RegisteredModel, way: str) -> str:
    """Who made another version champion than the one that a decision was about."""

    def moved_champion(entry: Entry) -> bool:
        return any("production" in (move.source, move.target) for move in entry.moves)

    last = next(filter(moved_champion, reversed(seen.history.entries)), None)
    told = f" ({last.told()}, entry {last.number})" if last else ""
    return f"version {seen.history.standing.champion or 'none'} of '{seen.model}' became champion meanwhile{told}; {way}"
