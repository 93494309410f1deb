"""The MLflow run of one optimization: its addresses, and how it is opened and closed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from featherweight.errors import told
from featherweight.masking import masked_tree
from featherweight.recipe.plan import Plan
from featherweight.recipe.reading import recipe_text
from featherweight.recipe.recipe import Recipe
from featherweight.registry.lineage import code_commit
from featherweight.store.artifact import content_digest
from featherweight.store.mlflow_errors import mlflow_explained
from featherweight.store.workspace import Workspace
from featherweight.system.environment import QUIET
from featherweight.system.locks import locked_file
from featherweight.system.processes import has_ended, host_and_pid
from featherweight.system.progress_channel import ProgressChannel
from featherweight.system.servers import check_url
from featherweight.system.user import user_name

if TYPE_CHECKING:
    from mlflow import MlflowClient


RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"


@dataclass(frozen=True)
class ParentRun:
    """Where an optimization's nested runs, artifacts and progress go: plain values, so that a stage may run in any process.

    tags: what every run of the optimization carries.
    """

    workspace: Workspace
    experiment_id: str
    run_id: str
    tags: Mapping[str, str] = field(default_factory=dict)
    progress: ProgressChannel = field(default_factory=ProgressChannel)

    @property
    def client(self) -> MlflowClient:
        """A client of the tracking server; MLflow keeps the connection behind it."""
        return self.workspace.client()


@contextmanager
def open_parent_run(
    recipe: Recipe, plan: Plan, workspace: Workspace, progress: ProgressChannel, extra_tags: Mapping[str, str]
) -> Iterator[ParentRun]:
    """The parent run of one optimization: FINISHED, FAILED or KILLED in the end. Raises ServiceError if MLflow is down.

    Until then nothing is collected that it may use: by the lock in its workspace, elsewhere by the run, which is there before it
    looks for anything.
    """
    with mlflow_explained(workspace.tracking_uri), locked_file(workspace.in_use, shared=True):
        client = connect(workspace)
        experiment = workspace.experiment(client, recipe.name)
        _bury_the_dead(client, experiment)
        with _parent_run(recipe, plan, client, experiment, extra_tags) as (run_id, tags), ambient(workspace.tracking_uri):
            yield ParentRun(workspace, experiment, run_id, tags, progress)


@contextmanager
def _parent_run(
    recipe: Recipe, plan: Plan, client: MlflowClient, experiment: str, extra_tags: Mapping[str, str]
) -> Iterator[tuple[str, dict[str, str]]]:
    """The run's id, and the tags that its nested runs carry too."""
    tags = _tags(recipe)
    own = {**tags, **extra_tags, "featherweight.kind": "optimization"}
    run = client.create_run(experiment, run_name=f"optimize {recipe.name}", tags=own)
    run_id = run.info.run_id
    client.log_text(run_id, recipe_text(recipe), "recipe.yaml")
    client.log_text(run_id, json.dumps(_described(plan), indent=1), "plan.json")
    with ended(client, run_id):
        yield run_id, tags


@contextmanager
def ended(client: MlflowClient, run_id: str) -> Iterator[None]:
    """The run of what is called inside, which ends with that: finished, failed or killed, and then with what stopped it."""
    try:
        yield
    except BaseException as error:
        client.set_tag(run_id, "featherweight.error", told(error))
        client.set_terminated(run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    client.set_terminated(run_id, "FINISHED")


@contextmanager
def ambient(tracking_uri: str) -> Iterator[None]:
    """What MLflow reads in the environment during a run: the store by which it resolves `models:/` sources, and its patience.

    A command that only asks fails at once where no server answers; a run waits for it, six minutes with MLflow's own waits.
    """
    told = {"MLFLOW_TRACKING_URI": tracking_uri}
    if os.environ.get(RETRIES) in (None, QUIET[RETRIES]):
        told[RETRIES] = "8"
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def connect(workspace: Workspace) -> MlflowClient:
    """A client of a tracking server that answers; raises ServiceError in one line otherwise."""
    check_url(workspace.tracking_uri, "MLflow", "MLFLOW_TRACKING_URI")
    with mlflow_explained(workspace.tracking_uri, files=True):
        client = workspace.client()
        client.search_experiments(max_results=1)
        return client


def _described(plan: Plan) -> dict[str, object]:
    """The plan as JSON."""
    return {
        "nodes": [
            {"id": n.id, "stage": n.stage, "inputs": dict(n.inputs), "spec": masked_tree(n.spec.model_dump(mode="json"))}
            for n in plan.nodes.values()
        ],
        "variants": [{"name": v.name, "served": v.served, "measured": v.measured} for v in plan.variants],
        "ruled_out": dict(plan.ruled_out),
    }


def _tags(recipe: Recipe) -> dict[str, str]:
    """What every run of this optimization carries."""
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    flow_run = str(context.flow_run.id) if context and context.flow_run else ""
    return {
        "featherweight.recipe": recipe.name,
        "featherweight.recipe_sha256": content_digest(recipe.model_dump(mode="json")),
        "featherweight.process": host_and_pid(),
        "featherweight.prefect_flow_run": flow_run,
        "mlflow.user": user_name(),
        "mlflow.source.git.commit": code_commit(),
    }


def _bury_the_dead(client: MlflowClient, experiment: str) -> None:
    """Runs that a killed process of this machine left open are closed as KILLED."""
    for run in client.search_runs([experiment], "attributes.status = 'RUNNING'", max_results=200):
        if has_ended(run.data.tags.get("featherweight.process", "")):
            client.set_terminated(run.info.run_id, "KILLED")
