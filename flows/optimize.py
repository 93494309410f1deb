"""The main job: a checkpoint goes in, a promoted champion comes out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import flow

from featherweight.recipe.facts import Facts
from featherweight.recipe.plan import ESSENTIAL, Plan, expand
from featherweight.recipe.reading import load_recipe
from featherweight.recipe.recipe import Recipe
from featherweight.report.result import OptimizationResult
from featherweight.store.workspace import Workspace
from featherweight.system.progress_channel import ProgressChannel
from flows.progress_view import PlainView, shown
from tasks.claim_runs import sign_own_run
from tasks.outcome import Outcome, Outcomes, blocked
from tasks.parent_run import ParentRun, open_parent_run
from tasks.run_node import run_node
from tasks.stages import stage_named
from tasks.summary import summarize


# Prefect lets a run that is completed never begin again where its result is persisted.
@flow(
    name="optimize",
    flow_run_name="optimize {recipe}",
    persist_result=True,
    result_serializer="json",
    validate_parameters=False,
)
def optimize_flow(
    recipe: str,
    overrides: list[str] | None = None,
    source: str | None = None,
    workspace: str = ".featherweight",
    tags: dict[str, str] | None = None,
    progress: str | None = None,
) -> dict[str, Any]:
    """Run, decide, register, promote, report. Parameters and result are plain JSON. Raises FeatherweightError.

    source: replaces the recipe's checkpoint. tags: go to the optimization's MLflow run. progress: the file that tells how it
    goes (featherweight.system.progress_channel) where somebody follows one; lines on standard error where not.
    """
    sign_own_run()
    changes = [*(overrides or []), *([f"checkpoint.source={source}", "checkpoint.train=null"] if source else [])]
    loaded = load_recipe(Path(recipe), tuple(changes))
    plan, place = expand(loaded, facts=Facts.read(loaded)), Workspace.at(Path(workspace))
    if progress is not None:
        return optimize(loaded, plan, place, ProgressChannel(Path(progress)), tags).to_dict()
    view = PlainView()
    view.begin(plan)
    with shown(view, place.root) as channel:
        return optimize(loaded, plan, place, channel, tags).to_dict()


def optimize(
    recipe: Recipe, plan: Plan, workspace: Workspace, progress: ProgressChannel, tags: Mapping[str, str] | None = None
) -> OptimizationResult:
    """The body of the flow, on what its parameters name."""
    with open_parent_run(recipe, plan, workspace, progress, tags or {}) as parent:
        result = summarize(recipe, plan, run_plan(plan, parent), parent)
    if result.winner is not None:
        progress.tell("say", f"winner: {result.winner}")
        progress.tell("say", result.registered)
    return result


def run_plan(plan: Plan, parent: ParentRun) -> Outcomes:
    """Run every node whose inputs are there; a failure costs the node's own variants only, unless it is essential."""
    outcomes: dict[str, Outcome] = {}
    for id, node in plan.nodes.items():
        stage = stage_named(node.stage)
        outcome = None if stage.gathers else blocked(node, outcomes)
        if outcome is None:
            parent.progress.tell("started", {"node": id, "stage": node.stage})
            inputs = {name: outcomes[origin] for name, origin in node.inputs.items() if outcomes[origin].ref}
            outcome = run_node(stage, node, inputs, parent)
        outcomes[id] = outcome
        parent.progress.tell("finished", {"node": id, "status": outcome.status, "note": outcome.reason})
        if id in ESSENTIAL and outcome.error is not None:
            raise outcome.error
    return outcomes
