"""promote: a registered version moves as far as the recipe says, once the gates let it through."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from featherweight.errors import GateError, told
from featherweight.progress import Metrics, Progress
from featherweight.recipe.recipe import PromoteSpec
from featherweight.registry.gate import GatesRefused
from featherweight.registry.promotion import FILE, Promotion, gated_transition, staged_for_approval
from featherweight.registry.registry import Registry
from featherweight.system.user import user_name
from tasks.parent_run import ParentRun
from tasks.register import Registration
from tasks.stage import stage


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
    who, rule = user_name(), spec.out_of_band
    try:
        if spec.approval == "required" and spec.stage == "production":
            moved = staged_for_approval(registry, found.model, found.version, who=who, why=why, rule=rule)
        else:
            told_by: Any = {"who": who, "why": why, "rule": rule, "smoke": spec.smoke}
            moved = gated_transition(registry, found.model, found.version, spec.stage, **told_by)
    except GateError as error:
        gates = error.gates if isinstance(error, GatesRefused) else ()
        return Promotion.of(registry.get(found.model, found.version), False, f"{name}; {told(error)}", gates)
    return replace(moved, reason=f"{name}, in {moved.stage}" + ("" if moved.changed and not moved.waits else f" ({moved.reason})"))
