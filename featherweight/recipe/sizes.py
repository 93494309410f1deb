"""How large the model is that each node of a plan works on: what a variant has lost by then, its nodes no longer handle."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from featherweight.checkpoint.spec import LoadSpec
from featherweight.spec import ModelSize

if TYPE_CHECKING:
    from featherweight.recipe.nodes import Node


def sizes(nodes: Mapping[str, Node], size: ModelSize, students: Mapping[str, ModelSize] | None = None) -> dict[str, ModelSize]:
    """By node id, of the model that the node is given, about.

    size: of the recipe's checkpoint. students: of other checkpoints, by source; one that is not known counts as large as the
    recipe's.
    """
    given: dict[str, ModelSize] = {}
    left: dict[str, ModelSize] = {}
    for id, node in nodes.items():
        own = (students or {}).get(node.spec.source) if id != "checkpoint" and isinstance(node.spec, LoadSpec) else None
        origin = node.inputs.get("served", node.inputs.get("checkpoint", ""))
        given[id] = own or left.get(origin, size)
        left[id] = left[node.inputs["student"]] if "student" in node.inputs else node.spec.left(given[id])
    return given
