"""Promotion: a version moves to a stage, through the gates on its way to production."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from featherweight.errors import FeatherweightError, IntegrityError
from featherweight.measure.spec import ConstraintsSpec
from featherweight.registry.decisions import APPROVAL
from featherweight.registry.evidence import verify_files
from featherweight.registry.gate import GatesRefused, judged
from featherweight.registry.history import GateResult, Rule, StageName
from featherweight.registry.lineage import read_graph
from featherweight.registry.out_of_band import look
from featherweight.registry.registry import RegisteredVersion, Registry
from featherweight.registry.smoke import SMOKE, smoked
from featherweight.registry.versions import CHAMPION, RegisteredModel
from featherweight.visible import in_lines

FILE = "promoted.json"


@dataclass(frozen=True)
class Promotion:
    """What a promotion did: the version, the stage where it now stands, and the gates that judged with their numbers.

    changed: False where the version, or its very digest, stood there already, and where a gate refused. waits: for a person's
    approval.
    """

    model: str
    version: str
    variant: str
    stage: str
    changed: bool
    reason: str
    gates: tuple[GateResult, ...] = ()
    waits: bool = False

    @property
    def unserved(self) -> str:
        """Why the version did not answer once it was champion, and so is champion no more; '' where it did, or was not asked."""
        return next((gate.reason for gate in self.gates if gate.gate == SMOKE and not gate.passed), "")

    @classmethod
    def of(cls, version: RegisteredVersion, changed: bool, reason: str, gates: tuple[GateResult, ...] = ()) -> Self:
        """What was done to a version as it now stands."""
        return cls(version.model, version.version, version.variant, version.stage, changed, reason, gates)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """What the stage did."""
        record = json.loads((folder / FILE).read_text())
        return cls(**{**record, "gates": tuple(GateResult(**gate) for gate in record["gates"])})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    def to_text(self) -> str:
        """One line, and one for each gate."""
        verb = "is now in" if self.changed else "stays in"
        first = f"{self.model} version {self.version} ({self.variant}) {verb} {self.stage}: {self.reason}"
        return in_lines([first, *(f"  {'passed' if g.passed else 'refused'}  {g.gate}: {g.reason}" for g in self.gates)])


def gated_transition(
    registry: Registry,
    model: str,
    version: str,
    to: StageName = "production",
    *,
    who: str,
    why: str,
    constraints: ConstraintsSpec | None = None,
    objective: str = "",
    force: bool = False,
    rule: Rule | Literal[""] = "",
    approved: bool = False,
    smoke: bool = False,
) -> Promotion:
    """Move a version to a stage, through the gates on its way to production. A refusal (GatesRefused) changes nothing.

    force: record the refusing gates with the transition instead of obeying them. rule: what becomes of aliases that are moved
    out of band from then on, as before if not given. approved: `who` is a person who approves, for the reason `why`. smoke: ask
    the new champion something; where it does not answer the former is champion again, and GatesRefused says so.
    """
    seen, _ = look(registry, model)
    candidate, champion = seen.pick(version), seen.holder(CHAMPION)
    if candidate.stage == to:
        return _stays(registry, candidate, f"version {candidate.version} is in {to} already")
    if to == "production" and champion is not None and champion.digest == candidate.digest:
        return _stays(registry, champion, f"version {champion.version}, the champion, is the same artifact")
    gates: list[GateResult] = []
    try:
        if to == "production":
            gates = judged(registry, candidate, champion, constraints, objective, f"{who}: {why}" if approved else "")
    except GatesRefused as error:
        if not force:
            raise
        gates = [GateResult("forced", False, str(error)[:1500])]
    expect = champion.version if champion else ""
    moved = registry.transition(model, candidate.version, to, who=who, why=why, gates=gates, expect_champion=expect, rule=rule)
    if smoke and to == "production":
        gates.append(smoked(registry, moved, who))
    return Promotion.of(moved, True, why, tuple(gates))


def _stays(registry: Registry, version: RegisteredVersion, reason: str) -> Promotion:
    """Nothing to do. Raises IntegrityError for a champion that is not what was registered: it is served."""
    try:
        if version.stage == "production":
            read_graph(registry, version)
            verify_files(registry, version)
    except FeatherweightError as error:
        way = f"`featherweight audit {version.model}` names what differs; restore it, roll back, or promote another"
        raise IntegrityError(f"{reason}, but not what was registered: {error}; {way}") from error
    return Promotion.of(version, False, reason)


def staged_for_approval(
    registry: Registry, model: str, version: str, *, who: str, why: str, rule: Rule | Literal[""] = ""
) -> Promotion:
    """Let a version wait in staging for a person's approval, once all other gates let it pass. Raises GatesRefused where not."""
    seen, _ = look(registry, model)
    candidate, champion = seen.pick(version), seen.holder(CHAMPION)
    if candidate.stage == "production" or (champion is not None and champion.digest == candidate.digest):
        return Promotion.of(candidate, False, f"version {candidate.version} is in {candidate.stage} already")
    if refused := _refused(seen, candidate):
        return Promotion.of(candidate, False, refused)
    waits = f"waits for approval (featherweight approve {model}/{candidate.version} --why ...)"
    gates = [gate for gate in _gates_before_approval(registry, candidate, champion) if gate.gate != APPROVAL]
    moved = registry.transition(model, candidate.version, "staging", who=who, why=f"{why}, {waits}", gates=gates, rule=rule)
    return replace(Promotion.of(moved, candidate.stage != "staging", waits, tuple(gates)), waits=True)


def answered(seen: RegisteredModel, version: str) -> bool:
    """Whether a person has decided about a version (its number) since it came to wait in staging."""
    own = [one for one in seen.history.transitions if one.version == version]
    waiting = max((place for place, one in enumerate(own) if one.target == "staging"), default=-1)
    return any(gate.gate == APPROVAL for one in own[waiting + 1 :] for gate in one.gates)


def _gates_before_approval(
    registry: Registry, candidate: RegisteredVersion, champion: RegisteredVersion | None
) -> Sequence[GateResult]:
    try:
        return judged(registry, candidate, champion)
    except GatesRefused as refused:
        if [gate.gate for gate in refused.gates if not gate.passed] != [APPROVAL]:
            raise
        return refused.gates


def _refused(seen: RegisteredModel, version: RegisteredVersion) -> str:
    """That a person refused a version, in words; '' where none did."""
    gates = [gate for one in seen.history.transitions if one.version == version.version for gate in one.gates]
    return next((gate.reason for gate in reversed(gates) if gate.gate == APPROVAL and not gate.passed), "")
