"""The champion measured again, on its own text or a fresh one, and made anew where that may win."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.errors import IntegrityError
from featherweight.measure.measurement import Comparison
from featherweight.measure.spec import ConstraintsSpec, WorkloadSpec
from featherweight.progress import Progress
from featherweight.registry.evidence import Evidence, evidence
from featherweight.registry.lineage import LineageGraph, LineageNode, otherwise
from featherweight.registry.registry import Registry
from featherweight.registry.remeasurement import Remeasurement, Then
from featherweight.registry.versions import parse_reference
from featherweight.store.artifact import ArtifactRef
from featherweight.store.workspace import Workspace
from featherweight.system.locks import locked_file
from featherweight.system.processes import host_and_pid
from featherweight.system.user import user_name
from featherweight.text.documents import write_documents
from featherweight.text.sources import read_source
from featherweight.text.spec import DataSpec
from tasks.evaluate import evaluate
from tasks.parent_run import ambient, connect, ended

if TYPE_CHECKING:
    from mlflow import MlflowClient

RESULT = "remeasurement.json"
Optimize = Callable[[Path, list[str]], str]
"""Runs a recipe's file with overrides, and says what it registered."""


def remeasure(workspace: Workspace, reference: str, text: str = "", progress: Progress = Progress()) -> Remeasurement:
    """Measure a registered version, the champion by default, beside its untouched checkpoint, as it was measured when registered.

    text: a file, folder or s3:// prefix of fresh text; its own held-out text where omitted. MLflow keeps the figures in a run of
    their own. Raises GateError for no such version, IntegrityError where it, its measurement or what it was compared with is
    altered or gone, DataError for text that cannot be read.
    """
    registry = Registry(workspace.tracking_uri)
    registry.check()
    model, version = parse_reference(reference, "champion")
    with (
        locked_file(workspace.in_use, shared=True),
        ambient(workspace.tracking_uri),
        tempfile.TemporaryDirectory() as scratch,
        evidence(registry, registry.get(model, version), files=True) as known,
        _recorded(workspace, known, text) as (client, run_id),
    ):
        now = _measured(workspace, registry, known, text, Path(scratch), progress)
        found = _held_against(known, now, text, run_id)
        _log(client, run_id, found, Path(scratch))
    return found


def _measured(
    workspace: Workspace, registry: Registry, known: Evidence, text: str, scratch: Path, progress: Progress
) -> Comparison:
    """The comparison of now, by the stage that made that of then, in what was asked for then."""
    node = known.graph.evaluation
    assert node is not None, "evidence has one"
    made = {name: parent for name, parent in known.graph.parents(node)}
    evaluation = _fresh(known.graph, text, scratch / "text") if text else _folder(workspace, made, "evaluation")
    evaluate(
        WorkloadSpec.model_validate(node.spec),
        served=registry.served_folder(known.version, scratch),
        baseline=_folder(workspace, made, "baseline"),
        evaluation=evaluation,
        out=scratch,
        seed=node.seed,
        progress=progress,
    )
    return Comparison.read(scratch)


def _fresh(graph: LineageGraph, text: str, folder: Path) -> Path:
    """The whole of a fresh text, read as the recipe reads its own."""
    data = DataSpec.model_validate(graph.recipe_tree["data"])
    write_documents(folder, read_source(text, data).documents)
    return folder


def _folder(workspace: Workspace, made: Mapping[str, LineageNode], name: str) -> Path:
    """The verified files of what the evaluation was given. Raises IntegrityError where they are altered or gone."""
    if name not in made:
        raise IntegrityError(f"its lineage does not say what its {name} was; nothing can be measured beside it")
    node = made[name]
    return workspace.materialize(
        ArtifactRef(uri=node.uri, digest=node.digest, run_id=node.run_id, node=node.id, seconds=0, metrics={})
    )


def _held_against(known: Evidence, now: Comparison, text: str, run_id: str) -> Remeasurement:
    tree, version = known.graph.recipe_tree, known.version
    constraints = ConstraintsSpec.model_validate(tree.get("constraints") or {})
    then = Then(Comparison.read(known.measured), constraints, version.tag("objective"), fresh=bool(text))
    return Remeasurement(
        model=version.model,
        version=version.version,
        text=text,
        then=then.comparison.metrics(),
        now=now.metrics(),
        otherwise={name: change for name, change in otherwise(known.graph).items() if name != "code"},
        same_machine=now.machine == then.comparison.machine,
        drifts=then.drifts(now),
        run=run_id,
    )


@contextmanager
def _recorded(workspace: Workspace, known: Evidence, text: str) -> Iterator[tuple[MlflowClient, str]]:
    """An MLflow run of the recipe's experiment: FINISHED, FAILED or KILLED in the end."""
    client = connect(workspace)
    version = known.version
    tags = {
        "featherweight.kind": "remeasurement",
        "featherweight.model": f"{version.model}/{version.version}",
        "featherweight.text": text or "its own",
        "featherweight.process": host_and_pid(),
        "mlflow.user": user_name(),
    }
    experiment = workspace.experiment(client, str(known.graph.recipe_tree["name"]))
    run_id = client.create_run(experiment, run_name=f"remeasure {version.model}/{version.version}", tags=tags).info.run_id
    with ended(client, run_id):
        yield client, run_id


def _log(client: MlflowClient, run_id: str, found: Remeasurement, measured: Path) -> None:
    from mlflow.entities import Metric, RunTag

    stamp = client.get_run(run_id).info.start_time
    drifted = ", ".join(one.what for one in found.drifts) or "nothing"
    tags = [RunTag("featherweight.drifted", drifted), RunTag("mlflow.note.content", found.to_text())]
    client.log_batch(run_id, [Metric(name, value, stamp, 0) for name, value in found.now.items()], tags=tags)
    client.log_artifact(run_id, str(measured / "measurement.json"))
    client.log_text(run_id, json.dumps(found.to_dict(), indent=1), RESULT)


def rebuilt(workspace: Workspace, found: Remeasurement, run: Optimize) -> Remeasurement:
    """What was measured, with what became of optimizing by the version's own recipe once more, judged on the fresh text if any.

    What nothing has changed is taken from the cache; the gates decide, as ever, whether the new winner is better.
    """
    registry = Registry(workspace.tracking_uri)
    before = registry.champion(found.model)
    with evidence(registry, registry.get(found.model, found.version)) as known:
        recipe = workspace.root / "recipes" / f"{found.model}-{found.version}.yaml"
        recipe.parent.mkdir(exist_ok=True)
        recipe.write_text(known.graph.recipe)
    told = run(recipe, [f"data.evaluation={json.dumps(found.text)}"] if found.text else [])
    after = registry.champion(found.model)
    replaced = after is not None and (before is None or after.version != before.version)
    return replace(found, rebuilt=told, replaced=replaced)
