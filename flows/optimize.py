"""The main job: a checkpoint goes in, a promoted champion comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import flow

from featherweight.errors import FeatherweightError, ToolchainError, told
from featherweight.recipe.plan import Node, Plan, expand
from featherweight.recipe.reading import load_recipe
from featherweight.recipe.recipe import Recipe
from featherweight.report.result import OptimizationResult
from featherweight.store.artifact import ArtifactRef
from featherweight.store.workspace import Workspace
from flows import conclusion
from flows.parent_run import open_session
from flows.progress_view import PlainView, View
from tasks.stage import Session, run_node
from tasks.stages import stage_named

# Without these there is nothing to measure, or nothing to measure against.
ESSENTIAL = ("text/train", "text/calibration", "text/evaluation", "gate", "checkpoint", "baseline", "baseline/evaluate")


@dataclass(frozen=True)
class Outcome:
    """How a node ended: 'done', 'cached', 'failed', 'skipped' (its toolchain is not here) or 'blocked' (an input is missing)."""

    node: Node
    status: str
    ref: ArtifactRef | None = None
    error: Exception | None = None

    @property
    def reason(self) -> str:
        """Why there is no artifact, in one line."""
        return told(self.error) if self.error else ""


@flow(name="optimize", flow_run_name="optimize {recipe}", persist_result=False, validate_parameters=False)
def optimize_flow(
    recipe: str,
    overrides: list[str] | None = None,
    source: str | None = None,
    workspace: str = ".featherweight",
    tags: dict[str, str] | None = None,
) -> dict[str, Any]:
    """The deployment's entry point: parameters are plain JSON; `source` replaces the recipe's checkpoint, `tags` go to its run."""
    changes = [*(overrides or []), *([f"checkpoint.source={source}", "checkpoint.train=null"] if source else [])]
    loaded = load_recipe(Path(recipe), tuple(changes))
    plan, view = expand(loaded), PlainView()
    view.begin(plan)
    return optimize(loaded, plan, Workspace.at(Path(workspace)), view, tags).to_dict()


def optimize(
    recipe: Recipe, plan: Plan, workspace: Workspace, view: View, tags: Mapping[str, str] | None = None
) -> OptimizationResult:
    """Run, decide, register, promote, report. Call it inside a Prefect flow. Raises FeatherweightError."""
    with open_session(recipe, plan, workspace, view.listener, tags or {}) as session:
        outcomes = run_plan(plan, session, view)
        return conclusion.conclude(recipe, plan, outcomes, session, view)


def run_plan(plan: Plan, session: Session, view: View) -> dict[str, Outcome]:
    """Run every node whose inputs are there; a failure costs the node's own variants only, unless it is essential."""
    outcomes: dict[str, Outcome] = {}
    refs: dict[str, dict[str, Any]] = {}
    for id, node in plan.nodes.items():
        outcome = _run(node, outcomes, refs, session, view)
        outcomes[id] = outcome
        view.finished(id, outcome.status, outcome.reason)
        if id in ESSENTIAL and outcome.error is not None:
            raise outcome.error
    return outcomes


def _run(node: Node, outcomes: dict[str, Outcome], refs: dict[str, dict[str, Any]], session: Session, view: View) -> Outcome:
    """Run one node; `refs` keeps the very objects that Prefect returned, by which it draws the edges of its graph."""
    for parent in node.inputs.values():
        if outcomes[parent].ref is None:
            status = "skipped" if outcomes[parent].status == "skipped" else "blocked"
            return Outcome(node, status, error=outcomes[parent].error)
    view.started(node)
    inputs = {name: refs[parent] for name, parent in node.inputs.items()}
    ref, cached, error = run_node(stage_named(node.stage), node, inputs, session)
    if ref is None:
        skipped = isinstance(error, ToolchainError)
        return Outcome(node, "skipped" if skipped else "failed", error=error or FeatherweightError("no result"))
    refs[node.id] = ref
    return Outcome(node, "cached" if cached else "done", ArtifactRef.model_validate(ref))
