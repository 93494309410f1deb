"""Whether a model fits the machine: what comes near is warned of; what cannot hold it, refusals.py refuses.

A stage holds the weights in float32 some times over, or, where they stay in their files (checkpoint/streamed.py), the integers that
they become, what it computes on at a time, and the engine that is looked at. docs/methods.md has the sums and what was measured.
"""

from __future__ import annotations

from collections.abc import Collection

from featherweight.checkpoint.streamed import LARGE
from featherweight.grid import grid_named
from featherweight.quantization.catalog import QUANTIZERS
from featherweight.quantization.rtn import RtnSpec
from featherweight.quantization.spec import QuantizeSpec
from featherweight.recipe.plan import Node, Plan
from featherweight.recipe.refusals import FLOAT_BYTES, gib
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.spec import ServingSpec
from featherweight.spec import ModelSize

HELD = {
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
PYTHON_BYTES = 600 * 2**20
"""The interpreter, torch and transformers."""
ROW_BYTES = 250
"""What finding a row again takes, for each row of each matrix (runtimes/packing.py)."""
AT_ONCE = 2
"""How often the embedding, the largest matrix, is there in float32 at once, what is computed of it included."""
KEPT = {"load": 1, "prune": 1, "quantize": 1.25, "distill": 1, "finetune": 1, "train": 1, "compile": 1, "export": 1}
"""How often its result holds them on the disk."""
NEAR = 0.8
"""The share of what there is that is worth a warning."""


def warnings(plan: Plan, size: ModelSize, memory_bytes: int, free_bytes: int, cached: Collection[str]) -> list[str]:
    """What a run of the plan may be too large for."""
    found = []
    to_run = [node for id, node in plan.nodes.items() if id not in cached]
    largest = max(to_run, key=lambda node: held_bytes(node, size), default=None)
    if largest and (needed := held_bytes(largest, size)) > NEAR * memory_bytes:
        found.append(f"{largest.id} holds about {gib(needed)} at once, and this machine has {gib(memory_bytes)} of memory")
    kept = sum(KEPT.get(node.stage, 0.0) for node in to_run) * FLOAT_BYTES * size.parameters
    if kept > NEAR * free_bytes:
        found.append(f"the results take about {gib(kept)}, and the workspace's disk has {gib(free_bytes)} free")
    return found


def held_bytes(node: Node, size: ModelSize) -> float:
    """Memory of its own that a stage and the engine that it starts take at once, about, for a model of `size`."""
    if node.stage == "load":
        return PYTHON_BYTES + FLOAT_BYTES * (size.parameters if size.packed else 0)
    if FLOAT_BYTES * size.parameters >= LARGE and size.table:
        beside = PYTHON_BYTES + AT_ONCE * FLOAT_BYTES * size.table
        if isinstance(node.spec, QuantizeSpec) and all(QUANTIZERS[name].streams for name in node.spec.methods):
            return beside + _quantizing(node.spec, size)
        if isinstance(node.spec, ServingSpec) and RUNTIMES[node.spec.engine].streams:
            return beside + _exporting(node.spec, size)
    return PYTHON_BYTES * (node.stage in HELD) + HELD.get(node.stage, 0.0) * FLOAT_BYTES * size.parameters


def _quantizing(spec: QuantizeSpec, size: ModelSize) -> float:
    """A byte for each integer, a scale for each group; what calibrates has a block, its copy, and matrices of second moments."""
    group = grid_named(spec.grid).group_size
    kept = size.parameters + (FLOAT_BYTES * size.parameters / group if group else 0.0)
    if isinstance(spec, RtnSpec):
        return kept
    block = (size.parameters - size.table) / max(1, size.layers)
    return kept + PYTHON_BYTES + FLOAT_BYTES * (2 * block + 4 * size.widest**2)


def _exporting(spec: ServingSpec, size: ModelSize) -> float:
    """The integers and the places of the rows that they are found by, and the engine with what it serves."""
    numbers = str(getattr(spec, "precision", getattr(spec, "compute_type", "float32")))
    if numbers not in ("int8", "int4"):  # CTranslate2 makes floats of int8_float32 when it loads them
        return PYTHON_BYTES + FLOAT_BYTES * size.parameters
    rows = size.parameters * size.matrices / max(1, size.columns)
    return 2 * size.parameters + ROW_BYTES * rows + PYTHON_BYTES
