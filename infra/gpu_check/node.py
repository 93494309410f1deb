"""The process of one node: a stage of a recipe's plan on one device, beside what the CPU made of the same inputs.

Usage: python -m infra.gpu_check.node RECIPE NODE WORK DEVICE [--beside]. Prints a line of JSON: `state`, `found`, `metrics`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from featherweight.errors import FeatherweightError, told
from featherweight.progress import Progress
from featherweight.recipe.plan import Node
from infra.gpu_check.plans import folder_of, plan_of


def run(node: Node, work: Path, device: str) -> dict[str, Any]:
    """Run the node on the inputs that the CPU made; where it made none itself, on this device's own."""
    from tasks.stages import stage_named

    stage, out = stage_named(node.stage), folder_of(work, device, node.id)
    inputs = {name: _made(work, id) for name, id in node.inputs.items()}
    out.mkdir(parents=True)
    options = {"scratch": out.with_name(f"{out.name}-scratch")} if stage.takes("scratch") else {}
    for folder in options.values():
        folder.mkdir()
    began = time.perf_counter()
    metrics = dict(stage.function(node.spec, out=out, seed=node.seed, progress=Progress(), **inputs, **options))
    return {"seconds": round(time.perf_counter() - began, 2), **metrics}


def _made(work: Path, id: str) -> Path:
    """The CPU's result of a node, or CUDA's where the CPU has none."""
    on_cpu = folder_of(work, "cpu", id)
    return on_cpu if on_cpu.exists() else folder_of(work, "cuda", id)


def main() -> int:
    """0 where the node ran and, beside the CPU's, lies within its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("node")
    parser.add_argument("work", type=Path)
    parser.add_argument("device", choices=("cpu", "cuda"))
    parser.add_argument("--beside", action="store_true", help="compare with what the CPU made")
    options = parser.parse_args()
    node = plan_of(options.recipe).nodes[options.node]
    try:
        metrics = run(node, options.work, options.device)
        state, found = "ok", _told(metrics)
    except FeatherweightError as error:
        state, found, metrics = "failed", told(error), {}
    if state == "ok" and options.beside:
        from infra.gpu_check.comparing import compared

        state, found, more = compared(node, options.work)
        metrics |= more
    print(json.dumps({"state": state, "found": found, "metrics": metrics}, default=str), flush=True)
    return 0 if state == "ok" else 1


def _told(metrics: dict[str, Any]) -> str:
    """The figures of an export or a measurement, in one line."""
    wanted = [key for key in metrics if key.startswith(("parity_", "tokens_per_s", "ttft", "speedup", "peak_"))]
    return ", ".join(f"{key} {metrics[key]:.4g}" for key in wanted) or f"{metrics.get('seconds', 0)} s"


if __name__ == "__main__":
    raise SystemExit(main())
