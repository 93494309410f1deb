"""promote: a registered version moves as far as the recipe says, once the gates let it through."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from featherweight.errors import GateError, IntegrityError, told
from featherweight.measure import goals
from featherweight.measure.figures import with_interval
from featherweight.measure.goals import BITS_PER_BYTE, QUALITY, SIZE, Figure
from featherweight.measure.spec import ConstraintsSpec
from featherweight.measure.statistics import Estimate
from featherweight.progress import Metrics, Progress
from featherweight.recipe.recipe import PromoteSpec
from featherweight.registry.evidence import with_evidence
from featherweight.registry.history import GateResult, StageName
from featherweight.registry.registry import RegisteredVersion, Registry
from featherweight.registry.versions import CHAMPION
from featherweight.system.user import user_name
from tasks.parent_run import ParentRun
from tasks.register import Registration
from tasks.stage import stage

FILE = "promoted.json"


class GatesRefused(GateError):
    """A gate refused; `gates` are all that judged, with their numbers."""

    def __init__(self, message: str, gates: tuple[GateResult, ...] = ()) -> None:
        super().__init__(message)
        self.gates = gates


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


def promotion_gate(
    candidate: RegisteredVersion,
    champion: RegisteredVersion | None,
    constraints: ConstraintsSpec | None = None,
    objective: str = "",
) -> list[GateResult]:
    """Judge a candidate by its recipe's constraints and against the present champion.

    It has to keep every constraint with its confidence bound; its bits per byte must not be worse than the champion's, beyond
    max_quality_loss where that is set; its objective must not be worse, both beyond the confidence intervals; and it
    has to be better in at least one of quality, speed and size. constraints, objective: those of the candidate's
    recipe if not given. Raises GatesRefused, with the reasons, if any gate refuses.
    """
    bounds = _registered_constraints(candidate) if constraints is None else constraints
    objective = objective or candidate.tag("objective") or goals.OBJECTIVE
    judged = goals.judge(bounds, objective, candidate.metrics)
    gates = [GateResult(one.constraint, one.kept, one.reason, one.value, one.bound) for one in judged]
    if champion is None:
        gates.append(GateResult("champion", True, "there is no champion to compare with"))
    else:
        gates += _champion_gates(candidate, champion, bounds, objective)
    refused = [f"{gate.gate}: {gate.reason}" for gate in gates if not gate.passed]
    if refused:
        over = f" over version {champion.version} ({champion.variant})" if champion else ""
        who = f"version {candidate.version} ({candidate.variant}) of '{candidate.model}'"
        raise GatesRefused(f"refused to promote {who}{over}; {'; '.join(refused)}", tuple(gates))
    return gates


@stage("promote", libraries=("mlflow",))
def promote(
    spec: PromoteSpec, *, registered: Path, parent: ParentRun, out: Path, seed: int = 0, progress: Progress = Progress()
) -> Metrics:
    """Move the version that was registered to `spec.stage`; write promoted.json: what moved, and the gates with their numbers.

    A gate that refuses is no failure: the version stays where it was, and the record says why.
    """
    record = _promoted(spec, Registration.read(registered), parent)
    (out / FILE).write_text(json.dumps(asdict(record), indent=1))
    refused = sum(not gate.passed for gate in record.gates)
    return {"changed": float(record.changed), "gates_passed": len(record.gates) - refused, "gates_refused": refused}


def _promoted(spec: PromoteSpec, found: Registration, parent: ParentRun) -> Promotion:
    """Promote what was registered, if anything; the reason tells both in one line."""
    if not found.version:
        return Promotion(spec.model, "", "", "none", False, f"nothing registered: {found.reason}")
    registry, why = Registry(parent.workspace.tracking_uri), f"winner of run {parent.run_id}"
    name, version = f"registered as {found.model} version {found.version}", registry.get(found.model, found.version)
    if spec.stage == "none":
        return Promotion.of(version, False, f"{name}, not promoted (promote.stage is none)")
    try:
        moved = gated_transition(registry, found.model, found.version, spec.stage, who=user_name(), why=why)
    except GateError as error:
        gates = error.gates if isinstance(error, GatesRefused) else ()
        return Promotion.of(version, False, f"{name}; {told(error)}", gates)
    return replace(moved, reason=f"{name}, in {moved.stage}" + ("" if moved.changed else f" ({moved.reason})"))


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
) -> Promotion:
    """Move a version to a stage, through the gates on its way to production. A refusal (GatesRefused) changes nothing.

    force: record the refusing gates with the transition instead of obeying them.
    """
    seen = registry.settle(model)
    candidate, champion = seen.pick(version), seen.holder(CHAMPION)
    if candidate.stage == to:
        return Promotion.of(candidate, False, f"version {candidate.version} is in {to} already")
    if to == "production" and champion is not None and champion.digest == candidate.digest:
        return Promotion.of(champion, False, f"version {champion.version}, the champion, is the same artifact")
    gates: list[GateResult] = []
    if to == "production":
        gates = _judged(registry, candidate, champion, constraints, objective, force)
    expect = champion.version if champion else ""
    moved = registry.transition(model, candidate.version, to, who=who, why=why, gates=gates, expect_champion=expect)
    return Promotion.of(moved, True, why, tuple(gates))


def _judged(
    registry: Registry,
    candidate: RegisteredVersion,
    champion: RegisteredVersion | None,
    constraints: ConstraintsSpec | None,
    objective: str,
    force: bool,
) -> list[GateResult]:
    """The gates on what is verified of both; without evidence none passes."""
    try:
        proven = _proven(registry, candidate, "re-evaluate it, or force", files=True)
        other = _proven(registry, champion, "re-evaluate the champion, or force") if champion else None
        return promotion_gate(proven, other, constraints, objective)
    except GatesRefused as error:
        if not force:
            raise
        return [GateResult("forced", False, str(error)[:1500])]


def _proven(registry: Registry, version: RegisteredVersion, way: str, files: bool = False) -> RegisteredVersion:
    """The version as its verified evaluation has it. Raises GatesRefused where there is none."""
    try:
        return with_evidence(registry, version, files)
    except IntegrityError as error:
        gate = GateResult("evidence", False, f"{told(error)[:1000]}; {way}")
        who = f"version {version.version} ({version.variant}) of '{version.model}'"
        raise GatesRefused(f"refused to promote on what is told of {who}; evidence: {gate.reason}", (gate,)) from error


def _registered_constraints(candidate: RegisteredVersion) -> ConstraintsSpec:
    stored: dict[str, Any] = json.loads(candidate.tag("constraints") or "{}")
    return ConstraintsSpec(**stored)


def _champion_gates(
    candidate: RegisteredVersion, champion: RegisteredVersion, constraints: ConstraintsSpec, objective: str
) -> list[GateResult]:
    """The gates that compare with the present champion."""
    if not _comparable(candidate, champion):
        reason = "measured on other evaluation text and from another checkpoint; re-evaluate the champion, or force"
        return [GateResult("comparable", False, reason)]
    progress = _progress_gate(candidate, champion, objective)
    if objective == "quality":
        return [_quality_gate(candidate, champion, 0.0), progress]
    allowance = constraints.max_quality_loss or 0.0
    return [_quality_gate(candidate, champion, allowance), _objective_gate(candidate, champion, objective), progress]


def _comparable(candidate: RegisteredVersion, champion: RegisteredVersion) -> bool:
    """The same evaluation text makes bits per byte comparable, the same checkpoint what is relative to it."""
    return _same(candidate, champion, "evaluation") or _same(candidate, champion, "checkpoint")


def _same(one: RegisteredVersion, other: RegisteredVersion, tag: str) -> bool:
    return one.tag(tag) == other.tag(tag)


def _quality(one: RegisteredVersion, other: RegisteredVersion) -> tuple[Figure, Estimate | None]:
    """Quality as a loss: bits per byte on one text, else the change from the checkpoint that each comes from."""
    change = QUALITY.read(one.metrics)
    if not _same(one, other, "evaluation") or BITS_PER_BYTE.key not in one.metrics:
        return QUALITY, change
    bits = BITS_PER_BYTE.read(one.metrics)
    if bits is None or change is None:
        return BITS_PER_BYTE, bits
    scale = bits.value / (1 + change.value)
    return BITS_PER_BYTE, Estimate(bits.value, scale * (1 + change.low), scale * (1 + change.high))


def _quality_gate(candidate: RegisteredVersion, champion: RegisteredVersion, allowance: float) -> GateResult:
    """Not worse than the champion's, beyond both intervals and the loss that the recipe allows."""
    (figure, new), (_, old) = _quality(candidate, champion), _quality(champion, candidate)
    if new is None or old is None:
        return GateResult("quality", False, goals.not_measured(figure))
    bound = old.high * (1 + allowance) if figure is BITS_PER_BYTE else old.high + allowance
    gate = _not_worse("quality", figure, new, old, bound)
    return replace(gate, reason=f"{gate.reason}, allowed loss {allowance:.2%}") if allowance else gate


def _objective_gate(candidate: RegisteredVersion, champion: RegisteredVersion, objective: str) -> GateResult:
    """Not worse than the champion's in what the recipe maximises, beyond both intervals."""
    name, figure = f"objective {objective}", goals.Objective.of(objective, candidate.metrics).figure
    new, old = figure.read(candidate.metrics), figure.read(champion.metrics)
    if new is None or old is None:
        whose = "" if new is None else " of the champion"
        return GateResult(name, False, f"{goals.not_measured(figure)}{whose}")
    return _not_worse(name, figure, new, old, figure.worst(old))


def _not_worse(name: str, figure: Figure, new: Estimate, old: Estimate, bound: float) -> GateResult:
    """The gate that the good side of the new interval has to reach the bound."""
    passed = figure.keeps(figure.best(new), bound)
    verdict = "is not worse than" if passed else "is worse than"
    reason = f"{figure.text(new)} {verdict} the champion's {with_interval(old, figure.show)}"
    return GateResult(name, passed, reason, figure.best(new), bound)


def _progress_gate(candidate: RegisteredVersion, champion: RegisteredVersion, objective: str) -> GateResult:
    """Better in something: noise alone must not let champions drift downwards step by step."""
    speed = goals.speed(goals.judged_batch(objective, candidate.metrics))
    quality, _ = _quality(candidate, champion)
    pairs = [(one, one.read(candidate.metrics), one.read(champion.metrics)) for one in (quality, speed, SIZE)]
    better = [
        f"{figure.name} {figure.show(new.value)} against {figure.show(old.value)}"
        for figure, new, old in pairs
        if new and old and not figure.keeps(old.value, new.value)
    ]
    reason = f"better in {', '.join(better)}" if better else "better than the champion in none of quality, speed and size"
    return GateResult("progress", bool(better), reason)
