"""The promotion gate: a candidate by its recipe's constraints, and against the present champion."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from featherweight.errors import GateError, IntegrityError, told
from featherweight.measure import goals
from featherweight.measure.figures import with_interval
from featherweight.measure.goals import BITS_PER_BYTE, QUALITY, SIZE, Figure
from featherweight.measure.spec import ConstraintsSpec
from featherweight.measure.statistics import Estimate
from featherweight.registry.decisions import APPROVAL
from featherweight.registry.evidence import with_evidence
from featherweight.registry.history import GateResult
from featherweight.registry.registry import RegisteredVersion, Registry

CHAMPIONS_WAY = "re-evaluate the champion, or force"


class GatesRefused(GateError):
    """A gate refused; `gates` are all that judged, with their numbers."""

    def __init__(self, message: str, gates: tuple[GateResult, ...] = ()) -> None:
        super().__init__(message)
        self.gates = gates


def promotion_gate(
    candidate: RegisteredVersion,
    champion: RegisteredVersion | None,
    constraints: ConstraintsSpec | None = None,
    objective: str = "",
) -> list[GateResult]:
    """Judge a candidate by its recipe's constraints and against the present champion.

    It has to keep every constraint with its confidence bound, and to be no slower by speculation; its bits per byte
    must not be worse than the champion's, beyond max_quality_loss where that is set; its objective must not be worse, both
    beyond the confidence intervals; and it has to be better in at least one of quality, speed and size. constraints, objective:
    those of the candidate's recipe if not given. Raises GatesRefused, with the reasons, if any gate refuses.
    """
    bounds = _registered_constraints(candidate) if constraints is None else constraints
    objective = objective or candidate.tag("objective") or goals.OBJECTIVE
    judged = [*goals.judge(bounds, objective, candidate.metrics), *goals.speculation_verdicts(objective, candidate.metrics)]
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


def judged(
    registry: Registry,
    candidate: RegisteredVersion,
    champion: RegisteredVersion | None,
    constraints: ConstraintsSpec | None = None,
    objective: str = "",
    approved: str = "",
) -> list[GateResult]:
    """The gates on what is verified of both; without evidence none passes. Raises GatesRefused, for a person's approval last.

    approved: by whom, and why, '' for nobody.
    """
    proven = _proven(registry, candidate, "re-evaluate it, or force", files=True)
    other = _proven(registry, champion, CHAMPIONS_WAY) if champion else None
    gates = promotion_gate(proven, other, constraints, objective)
    if approved:
        return [*gates, GateResult(APPROVAL, True, f"approved by {approved}")]
    if proven.tag("approval") != "required":
        return gates
    way = f"featherweight approve {candidate.model}/{candidate.version} --why ..."
    waits = GateResult(APPROVAL, False, f"its recipe wants a person's approval: {way}")
    who = f"version {candidate.version} ({candidate.variant}) of '{candidate.model}'"
    raise GatesRefused(f"{who} waits; {waits.reason}", (*gates, waits))


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


def foreseen(registry: Registry, champion: RegisteredVersion, objective: str, batch_sizes: Iterable[int]) -> str | None:
    """Why no candidate that is measured at these batch sizes would pass beside the champion; None where its numbers will tell."""
    try:
        proven = _proven(registry, champion, CHAMPIONS_WAY)
    except GatesRefused as error:
        return told(error)
    figure = goals.Objective.of(objective, {goals.speed(size).key: math.nan for size in batch_sizes}).figure
    if figure.read(proven.metrics) is not None:
        return None
    missing = f"{goals.not_measured(figure)} of the champion, version {champion.version} ({champion.variant})"
    return f"{missing}; take an objective that it was measured at, or force"


def _champion_gates(
    candidate: RegisteredVersion, champion: RegisteredVersion, constraints: ConstraintsSpec, objective: str
) -> list[GateResult]:
    """The gates that compare with the present champion."""
    if not _comparable(candidate, champion):
        reason = "measured on other evaluation text and from another checkpoint; evaluate on the champion's text, or force"
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
