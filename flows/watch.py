"""New checkpoints: look at a folder or an S3 prefix, and optimize every complete checkpoint there, once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow

from featherweight.checkpoint.new_checkpoints import Arrival, arrivals
from featherweight.masking import masked
from featherweight.recipe.reading import load_recipe
from featherweight.store.mlflow_errors import mlflow_explained
from featherweight.store.workspace import Workspace
from flows.optimize import optimize_flow
from tasks.parent_run import connect

CHECKPOINT = "featherweight.checkpoint_fingerprint"


@flow(name="watch", flow_run_name="watch {source}", persist_result=False, validate_parameters=False)
def watch_flow(
    source: str, recipe: str, overrides: list[str] | None = None, workspace: str = ".featherweight"
) -> list[dict[str, Any]]:
    """Optimize what is new below `source`; returns what was started. An optimization that failed is not started again by itself."""
    place = Workspace.at(Path(workspace))
    known = _known(place, load_recipe(Path(recipe), tuple(overrides or ())).name)
    started = []
    for arrival in arrivals(source):
        if arrival.fingerprint in known:
            continue
        started.append(_optimize(arrival, recipe, list(overrides or ()), workspace))
    return started


def _known(workspace: Workspace, recipe: str) -> set[str]:
    """Fingerprints of the checkpoints that an optimization of this recipe has taken up; a killed one does not count."""
    client = connect(workspace)
    with mlflow_explained(workspace.tracking_uri):
        experiment = workspace.find_experiment(client, recipe)
        if experiment is None:
            return set()
        runs = client.search_runs([experiment], f"tags.`{CHECKPOINT}` != ''", max_results=5000)
        return {run.data.tags[CHECKPOINT] for run in runs if run.info.status != "KILLED"}


def _optimize(arrival: Arrival, recipe: str, overrides: list[str], workspace: str) -> dict[str, Any]:
    """One optimization; its failure is told, and the other arrivals go on."""
    tags = {CHECKPOINT: arrival.fingerprint}
    state = optimize_flow(recipe, overrides, arrival.source, workspace, tags, return_state=True)
    told = {"source": arrival.source, "fingerprint": arrival.fingerprint, "state": state.name}
    if state.is_completed():
        return {**told, "winner": state.result()["winner"]}
    return {**told, "error": masked(state.message)}
