"""What the tests of the registry share: an MLflow store of their own, and winners small enough to register in a moment."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from featherweight.registry.lineage import LineageGraph, build
from featherweight.registry.registry import Registry, WinnerRecord
from featherweight.store.artifact import ArtifactRef, Manifest, describe_files, merkle_digest
from featherweight.store.served_folder import Serving
from featherweight.store.workspace import local_path
from tests.support.stores import empty_store

MODEL = "little-llama"
METRICS = {
    "bits_per_byte": 2.02,
    "quality_change": 0.01,
    "quality_change_low": 0.005,
    "quality_change_high": 0.015,
    "speedup_1": 8.0,
    "speedup_1_low": 7.5,
    "speedup_1_high": 8.5,
    "size_bytes": 1000.0,
    "peak_memory_bytes": 5000.0,
}

MEASURED = METRICS | {"threads_1": 3.0}


@dataclass(frozen=True)
class Bench:
    """A registry, and a run of an experiment whose artifacts lie in `artifacts`."""

    registry: Registry
    run_id: str
    experiment: str
    root: Path

    def artifact(self, name: str, stage: str = "export", **told: Any) -> tuple[ArtifactRef, Manifest]:
        """An artifact folder with a served variant's files, as a stage would leave it."""
        folder = self.root / "artifacts-of-runs" / name.replace("/", "-")
        folder.mkdir(parents=True)
        Serving("torch").write(folder)
        (folder / "model.safetensors").write_bytes(name.encode() * 1000)
        return self.publish(folder, name, stage, **told)

    def publish(self, folder: Path, name: str, stage: str = "export", **told: Any) -> tuple[ArtifactRef, Manifest]:
        """`folder` with a manifest, and the reference to it."""
        files = describe_files(folder)
        digest = merkle_digest(files)
        known = {"spec": {}, "seed": 0, "parents": {}, "metrics": {}, "environment": {"torch": "2.13"}, "machine": {}}
        times = {"started": "2026-11-01T00:00:00+00:00", "finished": "2026-11-01T00:00:01+00:00"}
        manifest = Manifest(digest=digest, files=files, stage=stage, node=name, key=name, **{**known, **times, **told})
        manifest.write(folder)
        ref = ArtifactRef(uri=folder.as_uri(), digest=digest, run_id=self.run_id, node=name, seconds=1.0, metrics=manifest.metrics)
        return ref, manifest

    def winner(
        self, name: str = "w8/torch", promote: Mapping[str, Any] | None = None, flow_run_id: str = "", **changes: Any
    ) -> WinnerRecord:
        """A winner that can be registered and promoted: measured, with a recipe of its constraints; `changes` to its fields."""
        metrics = changes.get("metrics", METRICS)
        said = {key: changes[key] for key in ("constraints", "objective") if key in changes}
        recipe = yaml.safe_dump({"name": "test", **said, "promote": {"model": MODEL, **(promote or {})}})
        made = self.artifact(name, parents={"checkpoint": self.origin[0][1].digest})
        measured = self.measurement(name, made[1].digest, metrics)
        told = {"recipe": recipe, "run_id": self.run_id, "metrics": metrics, "measured": measured[1].digest}
        told |= {"flow_run_id": flow_run_id}
        graph = build([*self.origin, made, measured], made[1].digest, variant=name, **told)
        origin = {"checkpoint": self.origin[0][1].digest, "evaluation": self.origin[1][1].digest}
        return self.record(name, made[0], graph, **{"recipe": recipe, **origin, **changes})

    def measurement(self, name: str, served: str, metrics: Mapping[str, float]) -> tuple[ArtifactRef, Manifest]:
        """The artifact of an evaluation."""
        folder = self.root / "artifacts-of-runs" / f"{name.replace('/', '-')}-measured"
        folder.mkdir(parents=True)
        (folder / "measurement.json").write_text(json.dumps({"of": served, "metrics": metrics}))
        parents = {"served": served, "evaluation": self.origin[1][1].digest}
        return self.publish(folder, f"{name}/evaluate", "evaluate", parents=parents, metrics=dict(metrics))

    @cached_property
    def origin(self) -> list[tuple[ArtifactRef, Manifest]]:
        """The checkpoint and the evaluation text that all winners of the bench share."""
        return [self.artifact("checkpoint", "load"), self.artifact("text/evaluation", "text")]

    def record(self, name: str, ref: ArtifactRef, graph: LineageGraph, **changes: Any) -> WinnerRecord:
        """The winner of an artifact and its lineage."""
        folder = local_path(ref.uri)
        assert folder is not None
        record = WinnerRecord(
            model=MODEL,
            variant=name,
            digest=ref.digest,
            served=folder,
            run_id=self.run_id,
            metrics=METRICS,
            lineage=graph.to_json(),
            checkpoint="c1",
            evaluation="e1",
        )
        return replace(record, **changes)

    def state(self) -> tuple[Any, ...]:
        """Everything that the registry holds, to compare before and after."""
        client = self.registry.client
        models = [(one.name, one.tags, one.aliases) for one in client.search_registered_models()]
        versions = [(one.name, one.version, one.tags, one.current_stage) for one in client.search_model_versions("")]
        logged = [one.model_id for one in client.search_logged_models([self.experiment])]
        return models, versions, logged


def bench(root: Path, tracking_uri: str = "", artifacts: str | None = "") -> Bench:
    """A bench on a fresh SQLite store in `root`, or on the server and the artifact root given (None: the server's own)."""
    root.mkdir(parents=True, exist_ok=True)
    if not tracking_uri:
        (root / "mlflow.db").write_bytes(empty_store())
    registry = Registry(tracking_uri or f"sqlite:///{root / 'mlflow.db'}")
    location = (root / "artifacts").as_uri() if artifacts == "" else artifacts
    experiment = registry.client.create_experiment(f"experiment of {root.name}", location)
    return Bench(registry, registry.client.create_run(experiment).info.run_id, experiment, root)


@pytest.fixture
def desk(tmp_path: Path) -> Bench:
    """A bench of this test's own."""
    return bench(tmp_path)


def plain_versions(client: MlflowClient, model: str, count: int) -> None:
    """A registered model with versions 1 to `count` that hold nothing: enough to promote, made in a moment."""
    client.create_registered_model(model, {"featherweight.name": model})
    for number in range(1, count + 1):
        tags = {"featherweight.digest": f"d{number}", "featherweight.variant": f"v{number}"}
        client.create_model_version(model, "featherweight:/nothing", tags=tags, await_creation_for=0)


def register(desk: Bench, name: str) -> str:
    """A version that can be served, as far as the registry is asked."""
    ref, manifest = desk.artifact(name)
    graph = build([(ref, manifest)], ref.digest, variant=name, recipe="name: test", run_id=desk.run_id, metrics=MEASURED)
    return desk.registry.register(desk.record(name, ref, graph)).version


def promoted(desk: Bench, version: str) -> None:
    """Make a version the champion."""
    desk.registry.transition(MODEL, version, "production", who="ada", why="a test")
