"""Stages on a Ray cluster: what is asked for them, what takes no part, and what a death costs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from featherweight.checkpoint.spec import LoadSpec
from featherweight.errors import DataError, ServiceError, StageError, ToolchainError, Unreachable
from featherweight.recipe.plan import Node
from featherweight.store.artifact import ArtifactRef
from featherweight.store.workspace import Workspace
from featherweight.system.device import CPU, CUDA
from featherweight.training.spec import FinetuneSpec
from tasks import on_ray
from tasks.on_ray import Cluster, ray_cluster
from tasks.parent_run import ParentRun
from tests.support import ray_stages
from tests.support.paths import ROOT
from tests.support.stores import new_workspace
from tests.support.waiting import until

HERE = {"code": "c", "libraries": "l", "hardware": "h", "sees": ""}


def node(name: str, source: Path | str = "x", **more: Any) -> Node:
    return Node(name, name, "", LoadSpec(source=str(source)), {}, device=CPU, **more)


def opened(workspace: Workspace) -> ParentRun:
    client = workspace.client()
    experiment = client.create_experiment("ray", (workspace.root / "artifacts").as_uri())
    return ParentRun(workspace, experiment, client.create_run(experiment).info.run_id)


@pytest.mark.parametrize("what", ["code", "libraries", "hardware"])
def test_a_node_of_another_make_takes_no_part(what: str) -> None:
    with pytest.raises(ServiceError, match=f"Ray's node 10.0.0.7 has other {what} than this process"):
        on_ray._require("10.0.0.7", HERE | {what: "other"}, HERE, local=False)
    on_ray._require("10.0.0.7", HERE, HERE, local=False)


def test_a_node_that_does_not_see_a_local_workspace_takes_no_part() -> None:
    with pytest.raises(ServiceError, match="does not see this workspace; share its folder, or name a server"):
        on_ray._require("10.0.0.7", HERE, HERE, local=True)
    on_ray._require("10.0.0.7", HERE | {"sees": "yes"}, HERE, local=True)


def test_a_measurement_has_all_processors_and_other_stages_their_share() -> None:
    cluster = Cluster(cpus=8, stages_per_node=4)
    training = Node("t", "train", "", FinetuneSpec(steps=1, processes=2), {}, device=CPU)
    asked = {name: cluster.options(one) for name, one in {"a": node("a"), "m": node("m", engines=("x",)), "t": training}.items()}
    assert {name: one["num_cpus"] for name, one in asked.items()} == {"a": 2, "m": 8, "t": 8}
    assert asked["a"]["num_gpus"] == 0
    assert cluster.options(Node("g", "g", "", LoadSpec(source="x"), {}, device=CUDA))["num_gpus"] == 1


def test_without_ray_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ToolchainError, match=r"pip install 'featherweight\[ray\]'"), ray_cluster(opened(new_workspace(tmp_path))):
        pass


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Any]:
    """Two raylets on this machine, a processor each; this process hangs on a third, which has none."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'featherweight[ray]'")
    from ray.cluster_utils import Cluster as Nodes

    nodes, before = Nodes(), dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    for processors in (0, 1, 1):
        nodes.add_node(num_cpus=processors, include_dashboard=False)
    os.environ["RAY_ADDRESS"] = nodes.address
    yield nodes
    nodes.shutdown()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.server
@pytest.mark.slow
def test_stages_run_there_and_what_they_make_lies_in_the_store(two_nodes: Any, tmp_path: Path) -> None:
    parent = opened(new_workspace(tmp_path))
    with ray_cluster(parent) as cluster:
        made = ArtifactRef.model_validate(cluster.run_stage(ray_stages.told, node("told"), {}, parent, "key"))
        assert made.metrics["pid"] != os.getpid() != made.metrics["ppid"]
        assert (parent.workspace.materialize(made) / "file").read_text() == "made"
        with pytest.raises(DataError, match="this text is none"):
            cluster.run_stage(ray_stages.refused, node("refused"), {}, parent, "other")
        with pytest.raises(StageError, match="crashing: its process crashed on its Ray node"):
            cluster.run_stage(ray_stages.crashing, node("crashing"), {}, parent, "third")
    states = {run.data.tags["featherweight.node"]: run.info.status for run in nested(parent)}
    assert states == {"told": "FINISHED", "refused": "FAILED", "crashing": "KILLED"}


@pytest.mark.server
@pytest.mark.slow
def test_a_node_that_dies_costs_the_stage_that_it_ran(two_nodes: Any, tmp_path: Path) -> None:
    parent, waits = opened(new_workspace(tmp_path)), tmp_path / "waits"
    waits.mkdir()
    with ray_cluster(parent) as cluster, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(cluster.run_stage, ray_stages.waiting, node("waiting", waits), {}, parent, "key")
        until(lambda: (waits / "started").exists())
        raylet = psutil.Process(int((waits / "started").read_text()))
        for process in (*raylet.children(recursive=True), raylet):
            process.kill()
        with pytest.raises(Unreachable, match="waiting: the Ray node that ran it has gone"):
            asked.result(timeout=300)
        (waits / "go").touch()
        assert cluster.run_stage(ray_stages.waiting, node("waiting", waits), {}, parent, "key")
    assert [run.info.status for run in reversed(nested(parent))] == ["KILLED", "FINISHED"]


def nested(parent: ParentRun) -> list[Any]:
    """The runs of the stages, the newest first."""
    query = f"tags.`mlflow.parentRunId` = '{parent.run_id}'"
    return list(parent.client.search_runs([parent.experiment_id], query, order_by=["attributes.start_time DESC"]))
