"""What the orchestration costs, what shared prefixes save, and how far the winner is ahead of the baseline.

Each of these runs `featherweight optimize` on a recipe in an empty workspace and reads the result that it prints;
`distill`, `recovery`, `ptq` and `qat` compare methods by the quality that they leave stories15M, over three seeds. Three run only
where they are named: `memory` is what stages hold of a model of 1.5 billion weights, and wants 25 GB of disk; `scale` is how cost
grows with variants, workers and versions; `peers` is what other tools make of the same checkpoint, and installs them.
Usage: python -m benchmarks [tiny | prefixes | stories15m | distill | recovery | ptq | qat | memory | scale | peers ...]
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results"
COMMAND = Path(sys.executable).with_name("featherweight")

Tree = dict[str, Any]


def optimize(recipe: Path, *options: str) -> Tree:
    """The JSON result of one optimization in an empty workspace; progress goes to the terminal."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(COMMAND), "optimize", str(recipe), "--json", "-w", folder, "--report", f"{folder}/report.html", *options]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if not done.stdout:
        raise SystemExit(f"{recipe.name} gave no result (exit code {done.returncode})")
    return json.loads(done.stdout)


def overhead(result: Tree) -> Tree:
    """Wall time of the flow, once the server is up, over the sum of its stages' own work."""
    work = sum(node["seconds"] for node in result["nodes"] if node["status"] == "done")
    return {"flow_s": round(result["seconds"], 1), "stages_s": round(work, 1), "ratio": round(result["seconds"] / work, 3)}


def stories15m() -> Tree:
    """Orchestration overhead and the winner's lead on a real pretrained model."""
    result = optimize(ROOT / "recipes" / "stories15m.yaml")
    return {"overhead": overhead(result), "winner": result["winner"], "variants": [_figures(row) for row in _measured(result)]}


def tiny(runs: int = 3) -> Tree:
    """Orchestration overhead where the stages are as small as they get, over several runs: the worst case."""
    found = [overhead(optimize(ROOT / "tests" / "support" / "tiny.yaml", "--set", "variants=[{serve: ct2}]")) for _ in range(runs)]
    ratios = [one["ratio"] for one in found]
    return {"runs": found, "median_ratio": statistics.median(ratios), "spread": [min(ratios), max(ratios)]}


def prefixes() -> Tree:
    """Twelve variants of one distilled and pruned parent: their cost beside the longest single path."""
    result = optimize(HERE / "prefixes.yaml")
    nodes = {node["id"]: node for node in result["nodes"]}
    evaluations = sum(node["seconds"] for node in nodes.values() if node["stage"] == "evaluate")
    paths = {row["name"]: _path_seconds(row, nodes) for row in _measured(result)}
    shared = sum(node["seconds"] for node in nodes.values()) - evaluations
    longest = max(paths.values())
    return {
        "variants": len(paths),
        "all_but_evaluations_s": round(shared, 1),
        "longest_path_but_evaluations_s": round(longest, 1),
        "ratio": round(shared / longest, 2),
        "unshared_s": round(sum(paths.values()), 1),
        "evaluations_s": round(evaluations, 1),
    }


def _measured(result: Tree) -> Iterable[Tree]:
    return [row for row in result["variants"] if row["status"] in ("winner", "loser", "baseline")]


def _path_seconds(row: Tree, nodes: dict[str, Tree]) -> float:
    return sum(nodes[id]["seconds"] for id in row["stages"] if nodes[id]["stage"] != "evaluate")


def _figures(row: Tree) -> Tree:
    kept = ("speedup", "tokens_per_s", "quality_change", "bits_per_byte", "size_bytes", "peak_memory_bytes")
    metrics = {name: value for name, value in row["metrics"].items() if name.startswith(kept)}
    return {"name": row["name"], "status": row["status"], "threads": row["threads"], **metrics}


def _of_methods(name: str) -> Callable[[], Tree]:
    """The benchmark of the module `name` beside this one."""

    def run() -> Tree:
        module = importlib.import_module(f"benchmarks.{name}")
        return dict(module.benchmark())

    return run


BENCHMARKS: dict[str, Callable[[], Tree]] = {
    "tiny": tiny,
    "prefixes": prefixes,
    "stories15m": stories15m,
    **{name: _of_methods(name) for name in ("distill", "recovery", "ptq", "qat", "memory", "scale", "peers")},
}
LARGE = {"memory", "scale", "peers"}


def main() -> None:
    """Run the named benchmarks and keep their figures in `results/`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", choices=[*BENCHMARKS, []], help="which; all but memory, scale and peers where none is named"
    )
    for name in parser.parse_args().names or [one for one in BENCHMARKS if one not in LARGE]:
        found = BENCHMARKS[name]()
        told = {"benchmark": name, "when": datetime.now(UTC).isoformat(timespec="seconds"), "cpu": _cpu(), **found}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(told, indent=1) + "\n")
        print(json.dumps(told, indent=1))


def _cpu() -> str:
    from featherweight.system.machine import available_cores, cpu_model

    return f"{cpu_model() or platform.machine()}, {available_cores()} cores"


if __name__ == "__main__":
    main()
