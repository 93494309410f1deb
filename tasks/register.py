"""register: every measured variant becomes a LoggedModel of the run, the winner a registered version with its lineage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from featherweight.errors import GateError, IntegrityError
from featherweight.measure.goals import Decision, judged_batching, judged_threads
from featherweight.measure.spec import BASELINE
from featherweight.progress import Metrics, Progress
from featherweight.recipe.recipe import RegisterSpec
from featherweight.registry.lineage import LineageGraph, build, source_of
from featherweight.registry.out_of_band import look
from featherweight.registry.registry import Measured, RegisteredVersion, Registry, WinnerRecord
from featherweight.store.artifact import ArtifactRef, Manifest
from featherweight.store.served_folder import Serving
from tasks.decide import read_decision
from tasks.parent_run import ParentRun
from tasks.stage import stage

FILE = "registered.json"
EVALUATION = "text/evaluation"


@dataclass(frozen=True)
class Registration:
    """The stage's record. version: empty where nothing was registered, for the reason given. new: it was not there before."""

    model: str
    variant: str = ""
    version: str = ""
    digest: str = ""
    uri: str = ""
    new: bool = False
    reason: str = ""

    @classmethod
    def read(cls, folder: Path) -> Self:
        """What the stage did."""
        return cls(**json.loads((folder / FILE).read_text()))


@stage("register", libraries=("mlflow",))
def register(
    spec: RegisterSpec,
    *,
    inputs: Mapping[str, Path],
    artifacts: Mapping[str, ArtifactRef],
    parent: ParentRun,
    out: Path,
    seed: int = 0,
    progress: Progress = Progress(),
) -> Metrics:
    """Register the winner that `inputs["decide"]` names, or find the version that holds its digest; write registered.json.

    The other inputs are every artifact of the plan by its node's id: the winner's lineage is among them. Without a winner
    nothing is registered.
    """
    decision = read_decision(inputs["decide"])
    registry = Registry(parent.workspace.tracking_uri)
    progress.note("logging the variants")
    registry.log_datasets(parent.run_id, _datasets(inputs, artifacts))
    logged = _log_variants(spec, inputs, artifacts, decision, registry, parent.run_id)
    if decision.winner is None:
        record = Registration(spec.model, reason=decision.summary)
    else:
        progress.note(f"registering {decision.winner}")
        winner = _winner(spec, inputs, artifacts, decision, parent, logged[decision.winner])
        record = _record(register_winner(registry, winner), decision)
        look(registry, record.model)
    (out / FILE).write_text(json.dumps(asdict(record), indent=1))
    return {"logged_models": len(logged), "new_versions": float(record.new)}


def register_winner(registry: Registry, winner: WinnerRecord) -> RegisteredVersion:
    """The winner's registered version, new or the one that holds its digest already.

    Raises GateError for a winner without numbers, IntegrityError where its lineage is that of another artifact.
    """
    if not winner.metrics:
        raise GateError(f"variant {winner.variant} has no measurement; evaluate it before registering")
    graph = LineageGraph.from_json(winner.lineage)
    if graph.served != winner.digest:
        raise IntegrityError(f"the lineage is of {graph.served[:12]}, the winner {winner.variant} is {winner.digest[:12]}")
    return registry.register(winner)


def _record(version: RegisteredVersion, decision: Decision) -> Registration:
    return Registration(version.model, version.variant, version.version, version.digest, version.uri, version.new, decision.summary)


def _datasets(inputs: Mapping[str, Path], artifacts: Mapping[str, ArtifactRef]) -> dict[str, tuple[str, str]]:
    """Digest and source of every text that went in, by its node."""
    texts = {id: Manifest.read(inputs[id]) for id in artifacts if id.startswith("text/")}
    return {id: (text.digest, source_of(text.spec) or id) for id, text in texts.items()}


def _log_variants(
    spec: RegisterSpec,
    inputs: Mapping[str, Path],
    artifacts: Mapping[str, ArtifactRef],
    decision: Decision,
    registry: Registry,
    run_id: str,
) -> dict[str, str]:
    """A LoggedModel for every measured variant; their ids by name."""
    ids = {}
    text = _datasets(inputs, artifacts).get(EVALUATION)
    for name, (served, measured) in spec.nodes.items():
        if measured not in artifacts:
            continue
        serving = Serving.read(inputs[served])
        fate = "baseline" if name == BASELINE else "winner" if name == decision.winner else "loser"
        reason = decision.summary if name == decision.winner else decision.reasons.get(name, "")
        ids[name] = registry.log_variant(
            run_id,
            name,
            artifacts[measured].metrics,
            {"engine": serving.engine, "grid": serving.grid or "float"},
            {"featherweight.status": fate, "featherweight.reason": reason[:4000]},
            Measured(artifacts[measured].run_id, EVALUATION, *text) if text else None,
        )
    return ids


def _winner(
    spec: RegisterSpec,
    inputs: Mapping[str, Path],
    artifacts: Mapping[str, ArtifactRef],
    decision: Decision,
    parent: ParentRun,
    model_id: str,
) -> WinnerRecord:
    """What the registry is told about the winner."""
    assert decision.winner is not None
    served, measured = (artifacts[id] for id in spec.nodes[decision.winner])
    graph = build(
        [(ref, Manifest.read(inputs[id])) for id, ref in artifacts.items()],
        served.digest,
        variant=decision.winner,
        recipe=spec.recipe,
        run_id=parent.run_id,
        flow_run_id=parent.tags.get("featherweight.prefect_flow_run", ""),
        measured=measured.digest,
        decided=artifacts["decide"].digest,
        reason=decision.summary,
        metrics=measured.metrics,
    )
    return WinnerRecord(
        model=spec.model,
        variant=decision.winner,
        digest=served.digest,
        served=inputs[spec.nodes[decision.winner][0]],
        run_id=parent.run_id,
        metrics=measured.metrics,
        lineage=graph.to_json(),
        recipe=spec.recipe,
        checkpoint=artifacts["checkpoint"].digest,
        evaluation=artifacts[EVALUATION].digest,
        machine=graph.hardware,
        constraints=spec.constraints.model_dump(exclude_none=True),
        objective=spec.objective,
        threads=judged_threads(spec.objective, measured.metrics),
        batching=judged_batching(measured.metrics),
        model_id=model_id,
    )
