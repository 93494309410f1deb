"""Stages on a Ray cluster: each asks for processors, memory and a GPU; a measurement has its machine to itself.

Prefect's task stays here, and what it does is asked of the cluster: inputs come from the artifact store, what is made goes there,
and a reference comes back. Every node of the cluster must be what this process is, in code, libraries and hardware: cache keys are
made here. A node that dies costs the stages that it ran, which Prefect tries again.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from featherweight.errors import ServiceError, StageError, ToolchainError, Unreachable
from featherweight.recipe.nodes import Node
from featherweight.runtimes.kept_worker import keep_workers
from featherweight.store.artifact import content_digest
from featherweight.store.mlflow_errors import mlflow_explained
from featherweight.store.workspace import Workspace, local_path
from featherweight.system.device import CUDA, stages_side_by_side
from featherweight.system.locks import locked_file
from featherweight.training.threads import cores
from tasks.cache_key import hardware
from tasks.parent_run import ParentRun
from tasks.run_node import run_stage
from tasks.stage import Stage

ADDRESS = "RAY_ADDRESS"
"""The cluster that is asked, as Ray's own programs read it; where it is not set, one is started on this machine."""
PROBE_S = 600
"""Until a node has said what it is: its process starts for that."""


@dataclass(frozen=True)
class Cluster:
    """What is asked for a stage, of nodes that have `cpus` processors each."""

    cpus: int
    stages_per_node: int

    def run_stage(
        self, stage: Stage, node: Node, inputs: Mapping[str, Mapping[str, Any]], parent: ParentRun, key: str
    ) -> dict[str, Any]:
        """The body of a stage's Prefect task (see tasks.run_node.run_stage), computed on a node of the cluster.

        Raises what the stage raised, Unreachable where its node died, StageError where its process did.
        """
        import ray
        from ray.exceptions import NodeDiedError, RayError, RayTaskError, WorkerCrashedError

        if node.device is None:
            return run_stage(stage, node, inputs, parent, key)
        asked = ray.remote(_run_there).options(**self.options(node)).remote(stage, node, inputs, parent, key)
        try:
            made: dict[str, Any] = ray.get(asked)
            return made
        except RayTaskError as error:
            raise error.cause from None
        except NodeDiedError as error:
            _close(parent, key)
            raise Unreachable(f"{node.id}: the Ray node that ran it has gone") from error
        except WorkerCrashedError as error:
            _close(parent, key)
            raise StageError(f"{node.id}: its process crashed on its Ray node") from error
        except RayError as error:
            _close(parent, key)
            raise Unreachable(f"{node.id}: Ray: {' '.join(str(error).split())[:300]}") from error
        except BaseException:
            ray.cancel(asked, force=True)
            raise

    def options(self, node: Node) -> dict[str, Any]:
        alone = bool(node.engines) or getattr(node.spec, "processes", 1) > 1
        cpus = self.cpus if alone else max(1, self.cpus // self.stages_per_node)
        return {"num_cpus": cpus, "num_gpus": 1 if node.device == CUDA else 0, "max_retries": 0}


@contextmanager
def ray_cluster(parent: ParentRun) -> Iterator[Cluster]:
    """The cluster at RAY_ADDRESS, or one of this machine that ends with this.

    Raises ToolchainError without Ray, ServiceError where nothing answers or a node cannot take part, each in one line.
    """
    try:
        import ray
    except ImportError as error:
        raise ToolchainError("engine: ray wants Ray; `pip install 'featherweight[ray]'`, or say engine: local") from error
    per_node = stages_side_by_side()
    address = os.environ.get(ADDRESS, "").strip() or None
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores() // per_node))
    told: dict[str, Any] = {"runtime_env": {"env_vars": {"OMP_NUM_THREADS": threads}}, "log_to_driver": False}
    if address is None:
        told |= {"include_dashboard": False, "num_cpus": cores()}
    try:
        ray.init(address or "local", logging_level=logging.ERROR, **told)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ServiceError(f"no Ray cluster answers at {ADDRESS}={address}: {reason}") from error
    try:
        alive = [node for node in ray.nodes() if node["Alive"]]
        _require_alike(alive, parent)
        yield Cluster(int(max(node["Resources"].get("CPU", 0) for node in alive)), per_node)
    finally:
        ray.shutdown()


def _require_alike(nodes: list[dict[str, Any]], parent: ParentRun) -> None:
    """Refuse a node whose results this process's cache keys would not describe, or that cannot reach what they need."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    workspace = parent.workspace
    with mlflow_explained(workspace.tracking_uri):
        artifacts = parent.client.get_experiment(parent.experiment_id).artifact_location
    local = workspace.tracking_uri.startswith("sqlite:") or local_path(artifacts) is not None
    with tempfile.NamedTemporaryFile(dir=workspace.root / "work") as token:
        here, probe = _describe(None), ray.remote(_describe)
        asked = {
            node["NodeManagerAddress"]: probe.options(
                num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(Path(token.name))
            for node in nodes
        }
        for address, answer in asked.items():
            try:
                there: Any = ray.get(answer, timeout=PROBE_S)
            except RayError as error:
                raise ServiceError(f"Ray's node {address} cannot take part: {' '.join(str(error).split())[:300]}") from error
            _require(address, there, here, local)


def _require(address: str, there: Mapping[str, str], here: Mapping[str, str], local: bool) -> None:
    for what in ("code", "libraries", "hardware"):
        if there[what] != here[what]:
            raise ServiceError(
                f"Ray's node {address} has other {what} than this process; "
                "start it on a machine and in an environment like this one's"
            )
    if local and not there["sees"]:
        raise ServiceError(
            f"Ray's node {address} does not see this workspace; share its folder, or name a server by MLFLOW_TRACKING_URI "
            "whose artifacts lie where all reach them, such as S3"
        )


def _describe(token: Path | None) -> dict[str, str]:
    """What a process is made of, by which results differ, and whether it sees `token`."""
    import featherweight
    import tasks

    folders = [Path(package.__file__).parent for package in (featherweight, tasks) if package.__file__]
    code = [(str(path.relative_to(folder)), path.read_text()) for folder in folders for path in sorted(folder.rglob("*.py"))]
    seen = "yes" if token is not None and token.exists() else ""
    libraries = [sys.version, *sorted(f"{one.name} {one.version}" for one in distributions())]
    return {"code": content_digest(code), "libraries": content_digest(libraries), "hardware": hardware(), "sees": seen}


def _run_there(stage: Stage, node: Node, inputs: Mapping[str, Mapping[str, Any]], parent: ParentRun, key: str) -> dict[str, Any]:
    """What a process of the cluster, which runs many, does for a stage; several nodes of a cluster may be one machine."""
    keep_workers()
    Workspace.at(parent.workspace.root)
    with locked_file(Path(tempfile.gettempdir()) / f"featherweight-{os.getuid()}.lock", shared=not node.engines):
        return run_stage(stage, node, inputs, parent, key)


def _close(parent: ParentRun, key: str) -> None:
    """Say of a stage's run that it was killed: nobody else is left to."""
    query = (
        f"tags.`featherweight.key` = '{key}' and tags.`mlflow.parentRunId` = '{parent.run_id}' and attributes.status = 'RUNNING'"
    )
    with mlflow_explained(parent.workspace.tracking_uri):
        for run in parent.client.search_runs([parent.experiment_id], query):
            parent.client.set_terminated(run.info.run_id, "KILLED")
