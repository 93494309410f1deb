"""Whether a run of a plan fits the machine: what comes near its memory or its disk is warned of (memory.py has the sums)."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from featherweight.measure.spec import BASELINE
from featherweight.recipe.memory import needed_bytes
from featherweight.recipe.plan import Plan
from featherweight.recipe.refusals import FLOAT_BYTES, gib
from featherweight.recipe.sizes import sizes
from featherweight.spec import ModelSize

KEPT = {"load": 1, "prune": 1, "quantize": 1.25, "distill": 1, "finetune": 1, "train": 1, "compile": 1, "export": 1}
"""How often its result holds them on the disk."""
NAMED = 6
"""Stages that are named at most where many are too large."""
NEAR = 0.8
"""The share of what there is that is worth a warning."""


def needs(plan: Plan, size: ModelSize, students: Mapping[str, ModelSize] | None = None) -> dict[str, float]:
    """Bytes of memory that each node holds at once, about, with the processes that it starts. students: see `sizes`."""
    given = sizes(plan.nodes, size, students)
    return {id: needed_bytes(node, plan.nodes, given) for id, node in plan.nodes.items()}


def warnings(plan: Plan, size: ModelSize, memory_bytes: int, free_bytes: int, cached: Collection[str]) -> list[str]:
    """What a run of the plan may be too large for."""
    found, given = [], sizes(plan.nodes, size)
    to_run = [node for id, node in plan.nodes.items() if id not in cached]
    numbers = getattr(plan.nodes[BASELINE].spec, "compute_type", "float32") if BASELINE in plan.nodes else "float32"
    if numbers != "float32":
        found.append(
            f"the baseline is served in {numbers}, as the checkpoint is stored: in float32 it takes "
            f"{gib(FLOAT_BYTES * size.parameters)}, and this machine has {gib(memory_bytes)} of memory"
        )
    held = {id: needed for id, needed in needs(plan, size).items() if id not in cached}
    large = sorted((id for id in held if held[id] > NEAR * memory_bytes), key=lambda id: -held[id])
    if large:
        others = ", ".join(f"{id} {gib(held[id])}" for id in large[1:NAMED])
        found.append(
            f"{large[0]} holds about {gib(held[large[0]])} at once, and this machine has {gib(memory_bytes)} of memory"
            + (f"; so do others: {others}" if others else "")
        )
    kept = sum(KEPT.get(node.stage, 0.0) * FLOAT_BYTES * given[node.id].parameters for node in to_run)
    if kept > NEAR * free_bytes:
        found.append(f"the results take about {gib(kept)}, and the workspace's disk has {gib(free_bytes)} free")
    return found
