"""Promote a registered version, once the gates let it through; roll back to the champion before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from featherweight.errors import GateError
from featherweight.measure.spec import ConstraintsSpec
from featherweight.registry.history import GateResult, StageName
from featherweight.registry.registry import RegisteredVersion, Registry

# constraint: (metric whose confidence bound is judged, the same metric's point estimate, whether more is better)
CONSTRAINTS = {
    "max_quality_loss": ("quality_change_high", "quality_change", False),
    "min_speedup": ("speedup_1_low", "speedup_1", True),
    "max_size_bytes": ("size_bytes", "size_bytes", False),
    "max_p95_latency_s": ("p95_latency_s_1", "p95_latency_s_1", False),
    "max_peak_memory_bytes": ("peak_memory_bytes", "peak_memory_bytes", False),
}


@dataclass(frozen=True)
class Interval:
    """A figure and its confidence interval; the figure itself three times where none was measured."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.value:.4g}"
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Promotion:
    """What a promotion did. `changed` is False where the version, or its very digest, stood there already."""

    version: RegisteredVersion
    former: RegisteredVersion | None
    gates: tuple[GateResult, ...]
    changed: bool
    reason: str


def promotion_gate(
    candidate: RegisteredVersion,
    champion: RegisteredVersion | None,
    constraints: ConstraintsSpec | None = None,
    objective: str = "",
) -> list[GateResult]:
    """Judge a candidate by its recipe's constraints and against the present champion.

    It has to keep every constraint with its confidence bound; its bits per byte must not be worse than the champion's, beyond
    max_quality_loss where that is set; its objective must not be worse, both beyond the confidence intervals; and it
    has to be better in at least one of quality, speed and size. constraints, objective: those registered with the
    candidate if not given. Raises GateError, with the reasons, if any gate refuses.
    """
    bounds = _registered_constraints(candidate) if constraints is None else constraints
    goal = objective or candidate.tag("objective") or "speedup@1"
    gates = _constraint_gates(candidate.metrics, bounds)
    if champion is None:
        gates.append(GateResult("champion", True, "there is no champion yet"))
    else:
        gates += _champion_gates(candidate, champion, bounds, goal)
    refused = [f"{gate.gate}: {gate.reason}" for gate in gates if not gate.passed]
    if refused:
        over = f" over version {champion.version} ({champion.variant})" if champion else ""
        who = f"version {candidate.version} ({candidate.variant}) of '{candidate.model}'"
        raise GateError(f"refused to promote {who}{over}; {'; '.join(refused)}")
    return gates


def promote(
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
    """Move a version to a stage, through the gates on its way to production. A refusal (GateError) changes nothing.

    force: record the refusing gates with the transition instead of obeying them.
    """
    candidate, champion = registry.get(model, version), registry.champion(model)
    if candidate.stage == to:
        return Promotion(candidate, champion, (), False, f"version {candidate.version} is in {to} already")
    if to == "production" and champion is not None and champion.digest == candidate.digest:
        return Promotion(champion, champion, (), False, f"version {champion.version}, the champion, is the same artifact")
    gates: list[GateResult] = []
    if to == "production":
        gates = _judged(candidate, champion, constraints, objective, force)
    expect = champion.version if champion else ""
    moved = registry.transition(model, candidate.version, to, who=who, why=why, gates=gates, expect_champion=expect)
    return Promotion(moved, champion, tuple(gates), True, why)


def rollback(registry: Registry, model: str, who: str, why: str) -> RegisteredVersion:
    """Make the champion before the present one champion again. Raises GateError where there is none."""
    return registry.rollback(model, who, why)


def _judged(
    candidate: RegisteredVersion,
    champion: RegisteredVersion | None,
    constraints: ConstraintsSpec | None,
    objective: str,
    force: bool,
) -> list[GateResult]:
    try:
        return promotion_gate(candidate, champion, constraints, objective)
    except GateError as error:
        if not force:
            raise
        return [GateResult("forced", False, str(error)[:1500])]


def _registered_constraints(candidate: RegisteredVersion) -> ConstraintsSpec:
    stored: dict[str, Any] = json.loads(candidate.tag("constraints") or "{}")
    return ConstraintsSpec(**stored)


def _constraint_gates(metrics: Mapping[str, float], constraints: ConstraintsSpec) -> list[GateResult]:
    """One gate per constraint that the recipe sets."""
    gates = []
    for name, bound in constraints.model_dump(exclude_none=True).items():
        bounded, plain, more = CONSTRAINTS[name]
        value = metrics.get(bounded, metrics.get(plain))
        if value is None:
            gates.append(GateResult(name, False, f"{plain} was not measured", bound=bound))
            continue
        kept = value >= bound if more else value <= bound
        sign = ">=" if more else "<="
        reason = f"{bounded} {value:.6g} {'keeps' if kept else 'breaks'} {sign} {bound:.6g}"
        gates.append(GateResult(name, kept, reason, value, bound))
    return gates


def _champion_gates(
    candidate: RegisteredVersion, champion: RegisteredVersion, constraints: ConstraintsSpec, objective: str
) -> list[GateResult]:
    """The gates that compare with the present champion."""
    if not _comparable(candidate, champion):
        reason = "measured on other evaluation text and from another checkpoint; re-evaluate the champion, or force"
        return [GateResult("comparable", False, reason)]
    progress = _progress_gate(candidate, champion)
    if objective == "quality":
        return [_quality_gate(candidate, champion, 0.0), progress]
    goal = _objective_gate(candidate.metrics, champion.metrics, objective)
    return [_quality_gate(candidate, champion, constraints.max_quality_loss or 0.0), goal, progress]


def _comparable(candidate: RegisteredVersion, champion: RegisteredVersion) -> bool:
    """The same evaluation text makes bits per byte comparable, the same checkpoint what is relative to it."""
    return _same(candidate, champion, "evaluation") or _same(candidate, champion, "checkpoint")


def _same(one: RegisteredVersion, other: RegisteredVersion, tag: str) -> bool:
    return one.tag(tag) == other.tag(tag)


def _quality(one: RegisteredVersion, other: RegisteredVersion) -> Interval | None:
    """Quality as a loss: bits per byte on one text, else the change from the checkpoint that both come from."""
    change = _interval(one.metrics, "quality_change")
    if not _same(one, other, "evaluation"):
        return change
    bits = one.metrics.get("bits_per_byte")
    if bits is None or change is None:
        return None if bits is None else Interval(bits, bits, bits)
    scale = bits / (1 + change.value)
    return Interval(bits, scale * (1 + change.low), scale * (1 + change.high))


def _quality_gate(candidate: RegisteredVersion, champion: RegisteredVersion, allowance: float) -> GateResult:
    """Not worse than the champion's, beyond both intervals and the loss that the recipe allows."""
    new, old = _quality(candidate, champion), _quality(champion, candidate)
    if new is None or old is None:
        return GateResult("quality", False, "quality was not measured")
    relative = _same(candidate, champion, "evaluation")
    what = "bits per byte" if relative else "relative change of bits per byte"
    bound = old.high * (1 + allowance) if relative else old.high + allowance
    passed = new.low <= bound
    allowed = f", allowed loss {allowance:.2%}" if allowance else ""
    verdict = "is not worse than" if passed else "is worse than"
    return GateResult("quality", passed, f"{what} {new} {verdict} the champion's {old}{allowed}", new.low, bound)


def _objective_gate(new: Mapping[str, float], old: Mapping[str, float], objective: str) -> GateResult:
    """Not worse than the champion's in what the recipe maximises, beyond both intervals."""
    metric, more = _objective_metric(objective)
    mine, theirs = _interval(new, metric), _interval(old, metric)
    if mine is None or theirs is None:
        return GateResult(f"objective {objective}", False, f"{metric} was not measured")
    passed = mine.high >= theirs.low if more else mine.low <= theirs.high
    verdict = "is not worse than" if passed else "is worse than"
    value, bound = (mine.high, theirs.low) if more else (mine.low, theirs.high)
    return GateResult(f"objective {objective}", passed, f"{metric} {mine} {verdict} the champion's {theirs}", value, bound)


def _objective_metric(objective: str) -> tuple[str, bool]:
    """The metric that an objective names, and whether more of it is better."""
    if objective.startswith("speedup@"):
        return f"speedup_{objective.removeprefix('speedup@')}", True
    return "size_bytes", False


def _progress_gate(candidate: RegisteredVersion, champion: RegisteredVersion) -> GateResult:
    """Better in something: noise alone must not let champions drift downwards step by step."""
    new, old = candidate.metrics, champion.metrics
    bits = "bits_per_byte" if _same(candidate, champion, "evaluation") else "quality_change"
    better = [
        f"{name} {new[key]:.4g} against {old[key]:.4g}"
        for name, key, sign in (("quality", bits, -1), ("speedup", "speedup_1", 1), ("size", "size_bytes", -1))
        if key in new and key in old and sign * new[key] > sign * old[key]
    ]
    reason = f"better in {', '.join(better)}" if better else "better than the champion in none of quality, speed and size"
    return GateResult("progress", bool(better), reason)


def _interval(metrics: Mapping[str, float], name: str) -> Interval | None:
    if name not in metrics:
        return None
    value = metrics[name]
    return Interval(value, metrics.get(f"{name}_low", value), metrics.get(f"{name}_high", value))
