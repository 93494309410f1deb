"""What running a plan would take: what is cached, what it took last time, an estimate for the rest. Runs nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featherweight.errors import FeatherweightError, Forbidden, RecipeError, ServiceError, told
from featherweight.recipe import fit
from featherweight.recipe.cost import Cost, estimate
from featherweight.recipe.facts import Facts
from featherweight.recipe.nodes import Node
from featherweight.recipe.plan import Plan, expand
from featherweight.recipe.recipe import Recipe
from featherweight.recipe.refusals import disk_refusal
from featherweight.registry.gate import foreseen
from featherweight.registry.registry import Registry
from featherweight.registry.versions import CHAMPION
from featherweight.spec import ModelSize
from featherweight.store.artifact import ArtifactRef
from featherweight.store.workspace import Workspace, require_able, was_used
from featherweight.system.environment import configure
from featherweight.system.machine import free_bytes, memory_bytes
from tasks.run_node import cached_ref
from tasks.stages import stage_named


@dataclass(frozen=True)
class PlanForecast:
    """A plan, the cost of its nodes, and what already looks wrong (a source that is not there).

    memory: bytes that each node holds at once, about, by its id; empty where the size of the model is not known. budget: seconds
    within which the variants are searched; None where all of them run.
    """

    plan: Plan
    costs: dict[str, Cost]
    warnings: tuple[str, ...]
    memory: dict[str, float] = field(default_factory=dict)
    budget: float | None = None

    @property
    def seconds(self) -> float:
        """What a run of it would take."""
        return sum(cost.seconds for cost in self.costs.values())

    @property
    def unshared_seconds(self) -> float:
        """What it would take if every variant paid for its whole path alone; what is of no variant's path counts once."""
        paths = [self.plan.path(variant.measured) for variant in self.plan.variants]
        rest = self.plan.nodes.keys() - {id for path in paths for id in path}
        return sum(self.costs[id].seconds for path in (*paths, rest) for id in path)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "nodes": [
                {
                    "id": n.id,
                    "stage": n.stage,
                    "inputs": dict(n.inputs),
                    "seconds": round(self.costs[n.id].seconds, 1),
                    "basis": self.costs[n.id].basis,
                    "memory_bytes": round(self.memory[n.id]) if n.id in self.memory else None,
                }
                for n in self.plan.nodes.values()
            ],
            "variants": [v.name for v in self.plan.variants],
            "ruled_out": dict(self.plan.ruled_out),
            "seconds": round(self.seconds, 1),
            "unshared_seconds": round(self.unshared_seconds, 1),
            "budget_seconds": self.budget,
            "warnings": list(self.warnings),
        }


def forecast(recipe: Recipe, root: Path) -> PlanForecast:
    """Expand the recipe for what its checkpoint tells, look up what is cached, estimate the rest.

    Raises RecipeError, CheckpointError, ServiceError where the folder can be no workspace.
    """
    require_able(root)
    facts = Facts.read(recipe)
    plan, size = expand(recipe, facts=facts), facts.size(recipe)
    require_room(size, root)
    cached, warnings = _cached(plan, root) if (root / "prefect").exists() else ({}, ())
    due = any(id not in cached and not stage_named(node.stage).acts for id, node in plan.nodes.items())
    measured = _measured(recipe, plan, root) if due and (root / "mlflow.db").exists() else {}
    students = {name: known.size for name, known in facts.by_source.items()}
    costs = estimate(plan, measured, set(cached), size, students=students)
    memory = fit.needs(plan, size, students) if size.parameters else {}
    large = fit.warnings(plan, size, memory_bytes(), free_bytes(root), cached)
    budget = recipe.search.budget if recipe.search else None
    refused = _standing(recipe, root) if due else ()
    return PlanForecast(plan, costs, (*facts.notes, *large, *warnings, *refused), memory, budget)


def standing(recipe: Recipe, tracking_uri: str) -> tuple[str, ...]:
    """What the registry would refuse whatever wins, so that it is known before the work: why nothing would be promoted, if so.

    Raises GateError, IntegrityError or Forbidden where registering or promoting would end in that error, ServiceError where MLflow
    cannot be reached.
    """
    registry, promote = Registry(tracking_uri), recipe.promote
    seen = registry.ready(promote.model, decides=promote.stage != "none")
    champion = seen.holder(CHAMPION) if seen and promote.stage == "production" else None
    why = foreseen(registry, champion, recipe.objective, recipe.workload.batch_sizes) if champion else None
    return (f"no other winner will be promoted: {why}",) if why else ()


def _standing(recipe: Recipe, root: Path) -> tuple[str, ...]:
    """The same for a plan, which is made without a server too."""
    if not was_used(root):
        return ()
    try:
        configure(root)
        return standing(recipe, Workspace.at(root).tracking_uri)
    except Forbidden:
        raise
    except ServiceError as error:
        return (f"what the registry would refuse is not known: {told(error)}",)


def require_room(size: ModelSize, root: Path) -> None:
    """Raise RecipeError where a workspace's disk cannot take in a checkpoint of this size."""
    if reason := disk_refusal(size, free_bytes(root)):
        raise RecipeError(reason)


def _cached(plan: Plan, root: Path) -> tuple[dict[str, ArtifactRef], tuple[str, ...]]:
    """Nodes that have a result already. A node's key is known once its inputs' digests are."""
    configure(root)
    refs: dict[str, ArtifactRef] = {}
    warnings: list[str] = []
    for id, node in plan.nodes.items():
        stage = stage_named(node.stage)
        there = {name: refs[origin].digest for name, origin in node.inputs.items() if origin in refs}
        if stage.acts or (len(there) < len(node.inputs) and not stage.gathers):
            continue
        try:
            key = stage.key(node, there)
        except FeatherweightError as error:
            warnings.append(f"{id}: {told(error)}")
            continue
        ref = cached_ref(key, Workspace.at(root))
        if ref is not None:
            refs[id] = ref
    return refs, tuple(warnings)


def _measured(recipe: Recipe, plan: Plan, root: Path) -> dict[str, float]:
    """Seconds that nodes of the same name and spec took in earlier runs of this recipe, the latest of each."""
    configure(root)
    client = Workspace.at(root).client()
    experiment = client.get_experiment_by_name(recipe.name)
    if experiment is None:
        return {}
    found: dict[str, float] = {}
    for run in client.search_runs([experiment.experiment_id], "attributes.status = 'FINISHED'", max_results=1000):
        id = run.data.tags.get("featherweight.node", "")
        node = plan.nodes.get(id)
        if node is not None and id not in found and run.data.params == _params(node):
            found[id] = run.data.metrics.get("stage_seconds", 0.0)
    return found


def _params(node: Node) -> dict[str, str]:
    return {name: str(value)[:500] for name, value in node.spec.model_dump(mode="json").items()}
