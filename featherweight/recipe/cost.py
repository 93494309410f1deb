"""What a plan will cost: what a node took last time where that is known, an estimate from its arithmetic elsewhere."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from featherweight.recipe.plan import Node, Plan
from featherweight.recipe.recipe import Recipe
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.spec import ServingSpec

# Seconds that a stage takes beside its arithmetic: imports, conversion, starting engines (seen on two AVX2 cores).
FIXED_S = {
    "text": 2,
    "gate": 8,
    "train": 6,
    "load": 2,
    "distill": 1,
    "prune": 2,
    "finetune": 1,
    "quantize": 3,
    "generate": 6,
    "decide": 3,
    "register": 2,
    "promote": 1,
}


@dataclass(frozen=True)
class Cost:
    """Seconds of a node and how they are known: 'cached' (nothing to do), 'measured' (last time) or 'estimated'."""

    seconds: float
    basis: str


def parameters_of(recipe: Recipe) -> int | None:
    """Number of weights of the recipe's checkpoint, without loading it; None where its source is not local."""
    spec = recipe.checkpoint.train
    if spec is not None:
        heads = spec.hidden_size // spec.heads
        attention = 2 * spec.hidden_size * (spec.hidden_size + heads * spec.kv_heads)
        mlp = 3 * spec.hidden_size * spec.intermediate_size
        return spec.vocab_size * spec.hidden_size + spec.layers * (attention + mlp)
    folder = Path(recipe.checkpoint.source or "")
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    try:
        width = 2 if "16" in str(json.loads((folder / "config.json").read_text()).get("dtype", "")) else 4
    except (OSError, ValueError):
        return None
    return sum(sizes) // width or None


def machine_flops() -> float:
    """Floating-point operations per second of a float32 matrix product here, measured in a tenth of a second."""
    import numpy as np

    a = np.random.default_rng(0).random((768, 768), dtype=np.float32)
    a @ a
    started, rounds = time.perf_counter(), 0
    while time.perf_counter() - started < 0.1:
        a @ a
        rounds += 1
    return rounds * 2 * 768**3 / (time.perf_counter() - started)


def estimate(plan: Plan, recipe: Recipe, measured: dict[str, float], cached: set[str]) -> dict[str, Cost]:
    """Cost of every node. `measured`: seconds by node id from earlier runs of the same spec; `cached`: ids with a result."""
    parameters, flops = parameters_of(recipe) or 0, machine_flops() / 3
    costs = {}
    for id, node in plan.nodes.items():
        if id in cached:
            costs[id] = Cost(0.0, "cached")
        elif id in measured:
            costs[id] = Cost(measured[id], "measured")
        else:
            costs[id] = Cost(node.spec.operations(parameters) / flops + _fixed(node, plan), "estimated")
    return costs


def _fixed(node: Node, plan: Plan) -> float:
    """Seconds that do not depend on the model's size."""
    if node.stage in ("decide", "register", "promote"):
        return FIXED_S[node.stage]
    served = plan.nodes[node.inputs.get("served", node.id)].spec
    if isinstance(served, ServingSpec):
        runtime = RUNTIMES[served.engine]
        return runtime.writing_s if node.spec is served else runtime.measuring_s
    return FIXED_S.get(node.stage, 1)
