"""Whether a model fits the machine: what comes near is warned of; what cannot hold it, refusals.py refuses."""

from __future__ import annotations

from collections.abc import Collection

from featherweight.recipe.plan import Node, Plan
from featherweight.recipe.refusals import FLOAT_BYTES, gib
from featherweight.spec import ModelSize

HELD = {
    "load": 2,
    "prune": 3,
    "sensitivity": 2,
    "quantize": 3.5,
    "distill": 6,
    "finetune": 5,
    "train": 5,
    "generate": 2.5,
    "compile": 4.5,
    "export": 2.5,
    "evaluate": 3,
}
"""How often a stage holds the weights in float32 at once: the model, its copies, gradients and optimizer, and its worker's."""
KEPT = {"load": 1, "prune": 1, "quantize": 1.25, "distill": 1, "finetune": 1, "train": 1, "compile": 1, "export": 1}
"""How often its result holds them on the disk."""
NEAR = 0.8
"""The share of what there is that is worth a warning."""


def warnings(plan: Plan, size: ModelSize, memory_bytes: int, free_bytes: int, cached: Collection[str]) -> list[str]:
    """What a run of the plan may be too large for."""
    weights, found = FLOAT_BYTES * size.parameters, []
    to_run = [node for id, node in plan.nodes.items() if id not in cached]
    largest = max(to_run, key=_held, default=None)
    if largest and _held(largest) * weights > NEAR * memory_bytes:
        needed = _held(largest) * weights
        found.append(f"{largest.id} holds about {gib(needed)} at once, and this machine has {gib(memory_bytes)} of memory")
    kept = sum(KEPT.get(node.stage, 0.0) for node in to_run) * weights
    if kept > NEAR * free_bytes:
        found.append(f"the results take about {gib(kept)}, and the workspace's disk has {gib(free_bytes)} free")
    return found


def _held(node: Node) -> float:
    return HELD.get(node.stage, 0.0)
