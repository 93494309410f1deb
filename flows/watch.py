"""New checkpoints: every one below a watched place is claimed, once, and taken up again when its optimization died."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.exceptions import Pause
from prefect.flow_engine import run_flow

from featherweight.checkpoint.arrivals import Seen, look
from featherweight.checkpoint.training_runs import Policy
from featherweight.errors import RecipeError
from featherweight.recipe.reading import load_recipe
from featherweight.registry.out_of_band import look as look_at
from featherweight.registry.registry import Registry
from featherweight.store.workspace import Workspace
from flows.optimize import optimize_flow
from flows.watch_schedule import not_ready
from tasks.claim_runs import ClaimRuns, reason_of, sign_own_run, tell
from tasks.claims import Claim, Patience, claim_key
from tasks.parent_run import ambient, connect

IDENTITY = "featherweight.checkpoint_identity"


@flow(name="watch", flow_run_name="watch {source}", persist_result=False, validate_parameters=False)
def watch_flow(
    source: str,
    recipe: str,
    overrides: list[str] | None = None,
    workspace: str = ".featherweight",
    take: str = "every",
    settle_s: float = 10.0,
    deployment: str = "optimize/optimize",
    patience: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """One look: claim what is new below `source`, and what may be tried again; returns what was seen, as plain JSON.

    take: which checkpoints of a training run ('every', 'every:N', 'best', 'best:METRIC'). settle_s: how long one that is new must
    have been at rest. deployment: what each optimization is a flow run of. patience: tasks.claims.Patience.
    """
    sign_own_run()
    place, policy, borne = Workspace.at(Path(workspace)), Policy.of(take), Patience(**(patience or {}))
    wanted = load_recipe(Path(recipe), tuple([*(overrides or []), "checkpoint.source=arrival", "checkpoint.train=null"]))
    _refuse_circle(source, wanted.promote.model)
    with ambient(place.tracking_uri):
        seen = look(source, place.root / "arrivals", settle_s, policy.taken)
    runs = ClaimRuns(deployment)
    known = runs.claims(borne, wanted.name)
    told: dict[str, dict[str, Any]] = {}
    for one in seen:
        if one.state == "ready":
            key = claim_key(wanted, one.identity)
            parameters = {"recipe": recipe, "overrides": list(overrides or []), "source": one.source, "workspace": workspace}
            claim = known[key] = _taken_up(runs, known.get(key, Claim(key, wanted.name)), one, borne, parameters)
            told.setdefault(key, {"source": one.source, "identity": one.identity, **claim.to_dict(borne)})
    return [
        *_moved(place, wanted.promote.model),
        *told.values(),
        *not_ready(seen),
    ]


def _moved(workspace: Workspace, model: str) -> list[dict[str, Any]]:
    """What somebody moved in MLflow behind the registered model's history, recorded by this look."""
    registry = Registry(workspace.tracking_uri)
    found = look_at(registry, model)[1] if model in registry.models() else None
    return [{"source": f"models:/{model}", "status": "out of band", "reason": found.why}] if found else []


def _taken_up(runs: ClaimRuns, claim: Claim, seen: Seen, patience: Patience, parameters: dict[str, Any]) -> Claim:
    """The claim after what is due was done."""
    due = claim.next_try(patience, datetime.now(UTC))
    if due is not None:
        require_store(Workspace.at(Path(parameters["workspace"])), claim.recipe)
        return runs.make(claim, *due, {**parameters, "tags": {IDENTITY: seen.identity}})
    if claim.last and claim.status(patience) == "quarantined":
        tell("quarantined", claim, claim.last.number, seen.source)
    return claim


def require_store(workspace: Workspace, recipe: str) -> None:
    """Raise ServiceError where MLflow would refuse every optimization of a recipe, before one is tried and its tries are spent."""
    workspace.find_experiment(connect(workspace), recipe)


def run_due(looked: list[dict[str, Any]], deployment: str) -> list[dict[str, Any]]:
    """Run here, one after another, what a look found queued and due; returns the look with what became of it."""
    runs = ClaimRuns(deployment)
    return [_run(runs, one) if one["status"] == "queued" and _is_due(one) else one for one in looked]


def _run(runs: ClaimRuns, one: dict[str, Any]) -> dict[str, Any]:
    """One optimization; its failure is told, and the others go on."""
    run = runs.begin(one["flow_run"])
    if run is None:
        return {**one, "status": "running", "reason": "another process has begun it, or waits for its turn"}
    try:
        state: Any = run_flow(optimize_flow, flow_run=run, return_type="state")
    except Pause:
        return {**one, "status": "unapproved", "reason": "the winner waits for a person: featherweight approve, or Prefect's page"}
    if state.is_completed():
        return {**one, "status": "done", "winner": state.result()["winner"]}
    return {**one, "status": "failed", "error": reason_of(state)}


def _is_due(one: dict[str, Any]) -> bool:
    return datetime.fromisoformat(one["since"]) <= datetime.now(UTC)


def _refuse_circle(source: str, model: str) -> None:
    """Raises RecipeError where what is made would arrive in its turn."""
    if source.removeprefix("models:").strip("/") == model and source.startswith("models:"):
        raise RecipeError(f"{source} is where this recipe registers its winners (promote.model); watch another model")
