"""Promotion: a version moves to a stage, through the gates on its way to production."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from featherweight.measure.spec import ConstraintsSpec
from featherweight.registry.gate import GatesRefused, judged
from featherweight.registry.history import GateResult, Rule, StageName
from featherweight.registry.out_of_band import look
from featherweight.registry.registry import RegisteredVersion, Registry
from featherweight.registry.versions import CHAMPION

FILE = "promoted.json"


@dataclass(frozen=True)
class Promotion:
    """What a promotion did: the version, the stage where it now stands, and the gates that judged with their numbers.

    changed: False where the version, or its very digest, stood there already, and where a gate refused.
    """

    model: str
    version: str
    variant: str
    stage: str
    changed: bool
    reason: str
    gates: tuple[GateResult, ...] = ()

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
        return "\n".join([first, *(f"  {'passed' if g.passed else 'refused'}  {g.gate}: {g.reason}" for g in self.gates)])


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
) -> Promotion:
    """Move a version to a stage, through the gates on its way to production. A refusal (GatesRefused) changes nothing.

    force: record the refusing gates with the transition instead of obeying them. rule: what becomes of aliases that are moved
    out of band from then on, as before if not given.
    """
    seen, _ = look(registry, model)
    candidate, champion = seen.pick(version), seen.holder(CHAMPION)
    if candidate.stage == to:
        return Promotion.of(candidate, False, f"version {candidate.version} is in {to} already")
    if to == "production" and champion is not None and champion.digest == candidate.digest:
        return Promotion.of(champion, False, f"version {champion.version}, the champion, is the same artifact")
    gates: list[GateResult] = []
    try:
        if to == "production":
            gates = judged(registry, candidate, champion, constraints, objective)
    except GatesRefused as error:
        if not force:
            raise
        gates = [GateResult("forced", False, str(error)[:1500])]
    expect = champion.version if champion else ""
    moved = registry.transition(model, candidate.version, to, who=who, why=why, gates=gates, expect_champion=expect, rule=rule)
    return Promotion.of(moved, True, why, tuple(gates))
