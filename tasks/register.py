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
    finished = _Finished(spec, inputs, artifacts, read_decision(inputs["decide"]), parent)
    decision, registry = finished.decision, Registry(parent.workspace.tracking_uri)
    progress.note("logging the variants")
    registry.log_datasets(parent.run_id, finished.texts())
    logged = finished.log_variants(registry)
    if decision.winner is None:
        record = Registration(spec.model, reason=decision.summary)
    else:
        progress.note(f"registering {decision.winner}")
        record = _record(register_winner(registry, finished.winner(decision.winner, logged[decision.winner])), decision)
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


@dataclass(frozen=True)
class _Finished:
    """What a run leaves to be registered: the plan's inputs and artifacts by node id, and what was decided of them."""

    spec: RegisterSpec
    inputs: Mapping[str, Path]
    artifacts: Mapping[str, ArtifactRef]
    decision: Decision
    parent: ParentRun

    def texts(self) -> dict[str, tuple[str, str]]:
        """Digest and source of every text that went in, by its node."""
        texts = {id: Manifest.read(self.inputs[id]) for id in self.artifacts if id.startswith("text/")}
        return {id: (text.digest, source_of(text.spec) or id) for id, text in texts.items()}

    def log_variants(self, registry: Registry) -> dict[str, str]:
        """A LoggedModel for every measured variant; their ids by name."""
        text, ids = self.texts().get(EVALUATION), {}
        for name, (served, measured) in self.spec.nodes.items():
            if measured not in self.artifacts:
                continue
            serving, ref = Serving.read(self.inputs[served]), self.artifacts[measured]
            ids[name] = registry.log_variant(
                self.parent.run_id,
                name,
                ref.metrics,
                {"engine": serving.engine, "grid": serving.grid or "float"},
                self._fate(name),
                Measured(ref.run_id, EVALUATION, *text) if text else None,
            )
        return ids

    def _fate(self, name: str) -> dict[str, str]:
        """What became of a variant, and why, as tags."""
        won = name == self.decision.winner
        fate = "baseline" if name == BASELINE else "winner" if won else "loser"
        reason = self.decision.summary if won else self.decision.reasons.get(name, "")
        return {"featherweight.status": fate, "featherweight.reason": reason[:4000]}

    def lineage(self, name: str) -> LineageGraph:
        """Of a variant that was decided for."""
        served, measured = (self.artifacts[id] for id in self.spec.nodes[name])
        return build(
            [(ref, Manifest.read(self.inputs[id])) for id, ref in self.artifacts.items()],
            served.digest,
            variant=name,
            recipe=self.spec.recipe,
            run_id=self.parent.run_id,
            flow_run_id=self.parent.tags.get("featherweight.prefect_flow_run", ""),
            measured=measured.digest,
            decided=self.artifacts["decide"].digest,
            reason=self.decision.summary,
            metrics=measured.metrics,
        )

    def winner(self, name: str, model_id: str) -> WinnerRecord:
        """What the registry is told about the winner. model_id: of its LoggedModel."""
        spec, graph, (served, measured) = self.spec, self.lineage(name), self.spec.nodes[name]
        metrics = self.artifacts[measured].metrics
        return WinnerRecord(
            model=spec.model,
            variant=name,
            digest=self.artifacts[served].digest,
            served=self.inputs[served],
            run_id=self.parent.run_id,
            metrics=metrics,
            lineage=graph.to_json(),
            recipe=spec.recipe,
            checkpoint=self.artifacts["checkpoint"].digest,
            evaluation=self.artifacts[EVALUATION].digest,
            machine=graph.hardware,
            constraints=spec.constraints.model_dump(exclude_none=True),
            objective=spec.objective,
            threads=judged_threads(spec.objective, metrics),
            batching=judged_batching(metrics),
            model_id=model_id,
        )
