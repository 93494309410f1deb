"""What a stage holds in memory at once, about: sums whose terms were measured (benchmarks/memory.py), for any model.

A stage holds the weights in float32 some times over, or, where they stay in their files (checkpoint/streamed.py), what it computes
on at a time and the engine that is looked at. docs/methods.md has the sums and what was measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from featherweight.checkpoint.streamed import LARGE
from featherweight.grid import grid_named
from featherweight.quantization.catalog import QUANTIZERS
from featherweight.quantization.spec import QuantizeSpec
from featherweight.recipe.refusals import FLOAT_BYTES, gib
from featherweight.recipe.sizes import sizes
from featherweight.runtimes.catalog import BASELINE as ENGINE
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.spec import ServingSpec
from featherweight.spec import ModelSize
from featherweight.system.device import CUDA

if TYPE_CHECKING:
    from featherweight.recipe.nodes import Node

HELD = {
    "prune": 3,
    "sensitivity": 2,
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
PART_BYTES = 2**30
"""Of the layers in float32 that CTranslate2's int8 is compared with at a time (runtimes/writing.py)."""
WEIGHT_BYTES = {"bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "w8a16": 1.0, "fp8": 1.0, "int4": 0.625, "w4a16": 0.625, "nf4": 0.625}
WEIGHT_BYTES |= {"q4_k": 0.6, "q5_k": 0.7, "q6_k": 0.85, "iq4_nl": 0.6, "int2": 0.3125}
"""Bytes for each weight, scales included, by the numbers that an engine holds; in all others floats of four bytes."""


def memory_obstacle(
    chain: Iterable[Node], roots: Mapping[str, Node], size: ModelSize, students: Mapping[str, ModelSize], memory_bytes: int
) -> str | None:
    """The first stage of a variant that so much memory cannot hold, in one line; None where all fit, or the size is not known.

    On a GPU a model takes the GPU's memory, which this does not judge. What measures serves two models whose pages are files'.
    """
    nodes = {**roots, **{node.id: node for node in chain}}
    given = sizes(nodes, size, students)
    for node in nodes.values():
        needed = held_bytes(node, given[node.id])
        if node.stage != "evaluate" and node.device != CUDA and needed > memory_bytes:
            return (
                f"{node.stage} of {given[node.id].parameters / 1e9:.2g} billion weights holds about {gib(needed)} at once, and "
                f"this machine has {gib(memory_bytes)} of memory; take what leaves the weights in their files (docs/methods.md, "
                "Large checkpoints), or a larger machine"
            )
    return None


def needed_bytes(node: Node, nodes: Mapping[str, Node], given: Mapping[str, ModelSize]) -> float:
    """`held_bytes` of one of a plan's nodes; a measurement of a large model holds what its two sides serve."""
    sides = {id for name, id in node.inputs.items() if name in ("served", "baseline")} if node.stage == "evaluate" else set()
    specs = {id: nodes[id].spec for id in sides if id in nodes}
    if not specs or FLOAT_BYTES * max(given[id].parameters for id in specs) < LARGE:
        return held_bytes(node, given[node.id])
    return PYTHON_BYTES + sum(served_bytes(spec, given[id]) for id, spec in specs.items() if isinstance(spec, ServingSpec))


def served_bytes(spec: ServingSpec, size: ModelSize) -> float:
    """Memory of the process that serves a model of `size`, about: its weights in the numbers that it holds them in."""
    return PYTHON_BYTES + WEIGHT_BYTES.get(_numbers(spec), FLOAT_BYTES) * size.parameters


def _numbers(spec: ServingSpec) -> str:
    return str(getattr(spec, "precision", getattr(spec, "compute_type", "float32")))


def held_bytes(node: Node, size: ModelSize) -> float:
    """Memory of its own that a stage and the engine that it starts take at once, about, for a model of `size`."""
    if node.stage == "load":
        return PYTHON_BYTES + FLOAT_BYTES * (size.parameters if size.packed else 0)
    if FLOAT_BYTES * size.parameters >= LARGE and size.table and size.in_files:
        if isinstance(node.spec, QuantizeSpec) and all(QUANTIZERS[name].streams for name in node.spec.methods):
            return PYTHON_BYTES + _quantizing(node.spec, size)
        if isinstance(node.spec, ServingSpec) and RUNTIMES[node.spec.engine].streams:
            return PYTHON_BYTES + _exporting(node.spec, size)
    copies = QUANTIZERS[node.spec.method].held if isinstance(node.spec, QuantizeSpec) else HELD.get(node.stage, 0.0)
    return PYTHON_BYTES * (copies > 0) + copies * FLOAT_BYTES * size.parameters


def _ends(size: ModelSize) -> float:
    """The embedding, as it is rounded, written or computed with."""
    return AT_ONCE * FLOAT_BYTES * size.table


def _quantizing(spec: QuantizeSpec, size: ModelSize) -> float:
    """What it becomes waits in files. What calibrates has its libraries, their scales for each group, a block, its copy, and
    matrices of second moments; the embedding comes before and after those.
    """
    if not spec.calibrated:
        return _ends(size)
    group = grid_named(spec.grid).group_size
    scales = FLOAT_BYTES * size.parameters / group if group else 0.0
    block = size.in_blocks / max(1, size.layers)
    return PYTHON_BYTES + scales + max(_ends(size), FLOAT_BYTES * (2 * block + 4 * size.widest**2))


def _exporting(spec: ServingSpec, size: ModelSize) -> float:
    """The places of the rows that integers are found by; and what is written at a time, or the engine with what it serves."""
    numbers = _numbers(spec)
    if spec.engine == ENGINE and numbers == "float32":  # the checkpoint's own files, and the reference itself
        return _ends(size)
    found = numbers in ("int8", "int4", "int2") and spec.engine in ("ctranslate2", "onnxruntime-genai")
    rows = size.parameters * size.matrices / max(1, size.columns) if found else 0.0
    twin = PYTHON_BYTES + min(FLOAT_BYTES * size.table + PART_BYTES, FLOAT_BYTES * size.parameters)
    compared = twin if found and spec.engine == "ctranslate2" else 0.0  # layers in float32, see ctranslate2/write.py
    return ROW_BYTES * rows + max(_ends(size), served_bytes(spec, size), compared)
