"""A registered version made once more from its lineage, in a workspace of its own, and compared node by node."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from featherweight.errors import GateError, IntegrityError
from featherweight.measure.spec import BASELINE
from featherweight.registry.lineage import LineageGraph, from_registry, otherwise
from featherweight.registry.registry import Registry
from featherweight.registry.versions import parse_reference
from featherweight.report.result import OptimizationResult
from featherweight.store.workspace import Workspace
from featherweight.visible import in_lines
from flows.launch import launch
from flows.progress_view import View

MEASURED = ("evaluate", "decide")
Verdict = Literal["equal", "differs", "not made"]


@dataclass(frozen=True)
class NodeVerdict:
    """A stage run of the lineage beside the one that was made now, by the digests of what they made."""

    id: str
    stage: str
    was: str
    now: str

    @property
    def verdict(self) -> Verdict:
        """Equal to the last byte, or not."""
        return "not made" if not self.now else "equal" if self.was == self.now else "differs"

    def to_text(self) -> str:
        """One line."""
        now = f" → [{self.now[:12]}]" if self.verdict == "differs" else ""
        return f"{self.verdict:<11}{self.id} [{self.was[:12]}]{now}"


@dataclass(frozen=True)
class Reproduction:
    """What making a version once more came to. otherwise: code and libraries that are not those of then, 'was → is'.

    quality: the figure of then and of now, where both were measured. nodes: all but measurements, parents before children.
    """

    version: str
    workspace: str
    otherwise: Mapping[str, str]
    nodes: tuple[NodeVerdict, ...]
    quality: tuple[float, float] | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**asdict(self), "nodes": [{**asdict(one), "verdict": one.verdict} for one in self.nodes], "equal": not self.wrong}

    def to_text(self) -> str:
        """What is otherwise, a line for each node, and what came of it."""
        lines = [f"otherwise  {name}: {change}" for name, change in self.otherwise.items()]
        lines += [one.to_text() for one in self.nodes]
        lines += ["bits per byte {1:.6g}, then {0:.6g}".format(*self.quality)] if self.quality else []
        return in_lines([*lines, f"{self.version}: {len(self.nodes) - len(self.wrong)} of {len(self.nodes)} nodes equal"])

    @property
    def wrong(self) -> list[NodeVerdict]:
        """The nodes that are not equal."""
        return [one for one in self.nodes if one.verdict != "equal"]

    def raise_if_wrong(self) -> None:
        """Raise IntegrityError naming the first node that is not equal: those behind it follow from it."""
        if self.wrong:
            first = self.wrong[0]
            raise IntegrityError(f"{self.version} is not reproduced: {first.id} {first.verdict}, the first of {len(self.wrong)}")


def reproduce(workspace: Workspace, reference: str, into: Path, view: View) -> Reproduction:
    """Run a version's own recipe, for its variant alone, in the workspace `into`, and compare what each stage made.

    Nothing is promoted there. Raises GateError for an unknown version, IntegrityError where its lineage was altered.
    """
    registry = Registry(workspace.tracking_uri)
    registry.check()
    told = from_registry(registry, *parse_reference(reference, "champion"))
    into.mkdir(parents=True, exist_ok=True)
    recipe = into / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of(told.graph), sort_keys=False))
    with _its_own_store():
        result = launch(recipe, (), into, view)
    return _compared(f"{told.model}/{told.version}", told.graph, result, into)


def recipe_of(graph: LineageGraph) -> dict[str, Any]:
    """The recipe of a lineage, narrowed to the variant that it is of, and promoting nothing. Raises GateError where it has none."""
    tree = dict(graph.recipe_tree)
    if not isinstance(tree.get("promote"), dict):
        raise GateError(
            "the lineage holds no recipe that optimizes and promotes; only what `featherweight optimize` registered is made anew"
        )
    tree["promote"] = {**tree["promote"], "stage": "none"}
    if graph.variant == BASELINE:
        return tree
    *made, serve = graph.variant.split("/")
    stages: Mapping[str, Any] = tree.get("stages") or {}
    chosen = {stage: name for name in made for stage in ("distill", "prune", "quantize") if name in (stages.get(stage) or {})}
    return {**tree, "variants": [{**chosen, "serve": serve}]}


@contextmanager
def _its_own_store() -> Iterator[None]:
    """A workspace's own MLflow, whatever server the environment names."""
    named = os.environ.pop("MLFLOW_TRACKING_URI", None)
    try:
        yield
    finally:
        if named is not None:
            os.environ["MLFLOW_TRACKING_URI"] = named


def _compared(version: str, graph: LineageGraph, result: OptimizationResult, into: Path) -> Reproduction:
    made = {node.id: node.digest for node in result.nodes}
    nodes = (NodeVerdict(one.id, one.stage, one.digest, made.get(one.id, "")) for one in graph.nodes if one.stage not in MEASURED)
    row, was = result.row(graph.variant), graph.metrics.get("bits_per_byte")
    now = row.metrics.get("bits_per_byte") if row else None
    quality = (was, now) if was is not None and now is not None else None
    return Reproduction(version, str(into), otherwise(graph), tuple(nodes), quality)
