"""The main job: a checkpoint goes in, a promoted champion comes out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.context import FlowRunContext

from featherweight.recipe.facts import Facts
from featherweight.recipe.nodes import Node
from featherweight.recipe.plan import ESSENTIAL, Plan, expand
from featherweight.recipe.reading import load_recipe
from featherweight.recipe.recipe import Recipe
from featherweight.report.result import OptimizationResult
from featherweight.runtimes.kept_worker import kept_workers
from featherweight.store.workspace import Workspace
from featherweight.system.device import Place, places
from featherweight.system.progress_channel import ProgressChannel
from flows.approval import awaited
from flows.progress_view import PlainView, shown
from tasks.claim_runs import sign_own_run
from tasks.forecast import standing
from tasks.on_ray import Cluster, ray_cluster
from tasks.outcome import Outcome, Outcomes, blocked
from tasks.parent_run import ParentRun, open_parent_run
from tasks.run_node import run_node
from tasks.searching import run_searched
from tasks.side_by_side import run_nodes
from tasks.stages import stage_named
from tasks.summary import summarize, waiting_result


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
    place = Workspace.at(Path(workspace))
    result = _before_it_was_suspended(place)
    if result is None:
        result = _run(loaded, place, progress, tags)
    return awaited(result, place, loaded.promote.smoke).to_dict()


def _before_it_was_suspended(workspace: Workspace) -> OptimizationResult | None:
    """What this flow run came to before it waited for a person, None where it begins."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None or context.flow_run.run_count < 2:
        return None
    return waiting_result(workspace, str(context.flow_run.id))


def _run(recipe: Recipe, workspace: Workspace, progress: str | None, tags: dict[str, str] | None) -> OptimizationResult:
    """The optimization, with lines on standard error where nobody follows it by a file."""
    facts = Facts.read(recipe)
    plan = expand(recipe, facts=facts)
    if progress is not None:
        return optimize(recipe, plan, workspace, ProgressChannel(Path(progress)), tags, facts)
    view = PlainView()
    view.begin(plan)
    with shown(view, workspace.root) as channel:
        return optimize(recipe, plan, workspace, channel, tags, facts)


def optimize(
    recipe: Recipe,
    plan: Plan,
    workspace: Workspace,
    progress: ProgressChannel,
    tags: Mapping[str, str] | None = None,
    facts: Facts = Facts(),
) -> OptimizationResult:
    """The body of the flow, on what its parameters name. facts: by which a search reckons how long a variant takes."""
    for note in standing(recipe, workspace.tracking_uri):
        progress.tell("say", note)
    with open_parent_run(recipe, plan, workspace, progress, tags or {}) as parent, kept_workers():
        result = summarize(recipe, plan, _run_where(recipe, plan, parent, facts), parent)
    if result.winner is not None:
        progress.tell("say", f"winner: {result.winner}")
        progress.tell("say", result.registered)
    return result


def _run_where(recipe: Recipe, plan: Plan, parent: ParentRun, facts: Facts) -> Outcomes:
    with ray_cluster(parent) if recipe.engine == "ray" else nullcontext() as cluster:
        if recipe.search is None:
            return run_plan(plan, parent, cluster)
        return run_searched(recipe, plan, facts, parent, lambda part, known: run_plan(part, parent, cluster, known))


def run_plan(plan: Plan, parent: ParentRun, cluster: Cluster | None = None, known: Outcomes | None = None) -> Outcomes:
    """Run every node whose inputs are there; a failure costs the node's own variants only, unless it is essential.

    known: the outcomes of nodes that ran before.
    """
    body = cluster.run_stage if cluster else None

    def run(node: Node, outcomes: Outcomes) -> Outcome:
        stage = stage_named(node.stage)
        outcome = None if stage.gathers else blocked(node, outcomes)
        if outcome is None:
            parent.progress.tell("started", {"node": node.id, "stage": node.stage})
            inputs = {name: outcomes[origin] for name, origin in node.inputs.items() if outcomes[origin].ref}
            outcome = run_node(stage, node, inputs, parent, body)
        parent.progress.tell("finished", {"node": node.id, "status": outcome.status, "note": outcome.reason})
        if node.id in ESSENTIAL and outcome.error is not None:
            raise outcome.error
        return outcome

    if cluster:  # which decides itself when it has room
        return run_nodes(plan, run, [Place(None, 1)] * max(2, len(plan.nodes)), lambda node, places: 1, known)
    return run_nodes(plan, run, places(), None, known)
