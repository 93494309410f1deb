"""How time and cost grow with variants, with stages side by side, with the size of the model and with that of the registry.

CPU seconds of a command and all that it starts, its server too, so that what else the machine does counts little; wall seconds
beside them. A made Llama of 0.4 million weights, each variant pruned by another share and served by CTranslate2: stages as small as
they get, so that what is left is what a variant costs whatever it is of. `python -m benchmarks.scale variants 4 16`, `workers 1 2`,
`models FOLDER TEXT`, `registry 100 1000`, `ray 16 600` run a part alone, `paper` reckons 70 billion weights; as a benchmark it runs
all that needs no folder and no quiet machine.

`ray VARIANTS STEPS` compares two nodes of Ray, here of one processor each, with one after the other on one thread: variants that
are finetuned for so many steps, since a measurement has its machine, which is one here, to itself.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from featherweight.store.artifact import content_digest

COMMAND = [sys.executable, "-m", "flows.cli"]
ROOT = Path(__file__).resolve().parents[1]
MADE = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "layers": 3,
    "heads": 4,
    "kv_heads": 2,
    "context": 128,
    "steps": 20,
}
SEVENTY = {
    "layers": 80,
    "hidden": 8192,
    "inner": 28672,
    "keys": 1024,
    "vocabulary": 128_256,
}
"""Llama 3 70B's shape: `keys` are the columns of its eight key heads."""
WORKLOAD = {
    "prompt_tokens": 8,
    "new_tokens": 16,
    "batch_sizes": [1],
    "rounds": 3,
    "windows": 8,
    "window_tokens": 64,
    "threads": [1],
}
ALWAYS_THE_SAME = ("train", "prune", "finetune", "export")
"""Stages whose files hold no measured time."""
Tree = dict[str, Any]


def recipe(variants: int, checkpoint: Tree, text: str = "python-stdlib", **more: Any) -> Tree:
    """So many variants beside the baseline. more: keys of each prune stage."""
    shares = {
        f"p{place}": {
            "method": "sparse",
            "criterion": "magnitude",
            "sparsity": (place + 1) / (2 * variants),
            **more,
        }
        for place in range(variants)
    }
    return {
        "name": "scale",
        "checkpoint": checkpoint,
        "data": {
            "source": text,
            "evaluation": 0.2,
            "calibration": 0.2,
            "max_bytes": 300_000,
        },
        "stages": {"prune": shares, "export": {"ct2": {"engine": "ctranslate2"}}},
        "variants": [{"prune": list(shares), "serve": "ct2"}],
        "workload": WORKLOAD,
        "objective": "speedup@1",
        "promote": {"model": "scale", "stage": "production", "smoke": False},
    }


def run(tree: Tree, folder: Path, side_by_side: int = 1, **told: str) -> Tree:
    """One run of a recipe: seconds of the wall and of processors, and how its stages ended. told: in the environment."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    environment = {**os.environ, "FEATHERWEIGHT_SIDE_BY_SIDE": str(side_by_side), **told}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    command = [
        *COMMAND,
        "optimize",
        str(path),
        "--json",
        "--quiet",
        "-w",
        str(folder / "w"),
        "--report",
        str(folder / "report.html"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    wall, after = (
        time.monotonic() - started,
        resource.getrusage(resource.RUSAGE_CHILDREN),
    )
    told = json.loads(done.stdout)
    if done.returncode:
        raise SystemExit(told.get("error", f"exit code {done.returncode}"))
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    computed = [node for node in told["nodes"] if not node["cached"]]
    size = sum(file.stat().st_size for file in (folder / "w").rglob("*") if file.is_file())
    return {
        "wall_s": round(wall, 1),
        "cpu_s": round(cpu, 1),
        "nodes": len(told["nodes"]),
        "computed": len(computed),
        "workspace_mb": round(size / 1e6, 1),
        "measuring_s": round(sum(node["seconds"] for node in computed if node["stage"] == "evaluate"), 1),
        "other_stages_s": round(sum(node["seconds"] for node in computed if node["stage"] != "evaluate"), 1),
        "made": content_digest([[node["id"], node["digest"]] for node in computed if node["stage"] in ALWAYS_THE_SAME]),
    }


def variants(counts: list[int]) -> Tree:
    """A first run and a second one, which finds all in the cache."""
    found = {}
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            tree = recipe(count, {"train": MADE})
            found[str(count)] = {
                "first": run(tree, Path(folder)),
                "second": run(tree, Path(folder)),
            }
    return found


def workers(counts: list[int], of: int = 4) -> Tree:
    """`of` variants, with so many stages side by side."""
    found = {}
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            found[str(count)] = run(recipe(of, {"train": MADE}), Path(folder), count)
    return found


def ray(count: int, steps: int, rounds: int = 2) -> Tree:
    """So many variants one after the other and on two nodes of Ray, each with one thread, in turns."""
    finetune = {"steps": steps, "batch": 8, "sequence": 128}
    tree = recipe(count, {"train": MADE})
    tree["stages"]["prune"] = {name: {**spec, "finetune": finetune} for name, spec in tree["stages"]["prune"].items()}
    found: dict[str, list[Tree]] = {"local": [], "two_nodes": []}
    with _two_nodes() as address:
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as folder:
                found["local"].append(run(tree, Path(folder), OMP_NUM_THREADS="1"))
            with tempfile.TemporaryDirectory() as folder:
                here = {"OMP_NUM_THREADS": "1", "RAY_ADDRESS": address}
                found["two_nodes"].append(run(tree | {"engine": "ray"}, Path(folder), **here))
    local, nodes = (min(one["wall_s"] for one in found[name]) for name in ("local", "two_nodes"))
    same = len({one["made"] for runs in found.values() for one in runs}) == 1
    return {**found, "ratio_of_the_best": round(nodes / local, 3), "same_digests": same}


@contextmanager
def _two_nodes() -> Iterator[str]:
    """The address of two raylets of one processor each; who asks hangs on a third, which has none."""
    from ray.cluster_utils import Cluster

    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    nodes = Cluster()
    try:
        for processors in (0, 1, 1):
            nodes.add_node(num_cpus=processors, include_dashboard=False)
        yield nodes.address
    finally:
        nodes.shutdown()


def models(folder: Path, text: str) -> Tree:
    """Two variants of a checkpoint of somebody's own, without training: that grows with its steps, which are the recipe's."""
    with tempfile.TemporaryDirectory() as place:
        return run(recipe(2, {"source": str(folder)}, text, finetune=None), Path(place))


def registry(counts: list[int]) -> Tree:
    """A model with so many versions: CPU seconds to read it whole, as every decision does, and to move one, in SQLite."""
    from featherweight.registry.registry import Registry

    found: Tree = {}
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            here = Registry(f"sqlite:///{folder}/mlflow.db")
            here.client.create_registered_model("many", {"featherweight.name": "many"})
            for number in range(count):
                tags = {
                    "featherweight.digest": f"d{number}",
                    "featherweight.variant": f"v{number}",
                }
                here.client.create_model_version("many", "featherweight:/nothing", tags=tags, await_creation_for=0)
            found[str(count)] = _timed(here)
    return found


def _timed(registry: Any) -> Tree:
    read = [_cpu(lambda: registry.model("many")) for _ in range(3)]
    moves = [
        partial(
            registry.transition,
            "many",
            str(number),
            "production",
            who="bench",
            why="bench",
        )
        for number in (1, 2, 3)
    ]
    rounded = {"read_cpu_s": read, "transition_cpu_s": [_cpu(move) for move in moves]}
    return {name: [round(one, 3) for one in seconds] for name, seconds in rounded.items()}


def _cpu(call: Any) -> float:
    before = time.process_time()
    call()
    return time.process_time() - before


def paper() -> Tree:
    """What the plan reckons for 70 billion weights: memory of each stage (recipe/memory.py), and its time (recipe/cost.py).

    Speeds: float32 of one H100 (67 TFLOP/s, 3.35 TB/s), and of a host of 64 cores (5 TFLOP/s, 250 GB/s).
    """
    from featherweight.recipe.cost import Speeds, estimate
    from featherweight.recipe.fit import needs
    from featherweight.recipe.plan import expand
    from featherweight.recipe.recipe import Recipe

    long = {"samples": 128, "sequence": 2048}
    train = {"steps": 1000, "batch": 64, "sequence": 2048}
    tree = recipe(1, {"source": "llama-3-70b"}) | {
        "stages": {
            "distill": {"half": {"layers": 40, **train}},
            "prune": {"narrow": {"method": "width", "finetune": train}},
            "quantize": {
                "rtn8": {"grid": "int8"},
                **{name: {"method": name, "grid": "int4-g128", **long} for name in ("gptq", "awq")},
            },
            "export": {
                "v16": {"engine": "vllm", "compute_type": "bfloat16"},
                "v8": {"engine": "vllm", "compute_type": "w8a8"},
                "v4": {"engine": "vllm", "compute_type": "w4a16"},
            },
        },
        "variants": [
            {"quantize": "rtn8", "serve": "v8"},
            {"quantize": ["gptq", "awq"], "serve": "v4"},
            {"prune": "narrow", "serve": "v16"},
            {"distill": "half", "serve": "v16"},
        ],
    }
    speeds = {"h100_hours": Speeds(67e12, 3.35e12), "host_hours": Speeds(5e12, 2.5e11)}
    plan, size = expand(Recipe.model_validate(tree)), _seventy()
    memory = needs(plan, size)
    times = {name: estimate(plan, {}, set(), size, one) for name, one in speeds.items()}
    rows = {
        id: {
            "stage": node.stage,
            "gib": round(memory[id] / 2**30),
            **{name: round(told[id].seconds / 3600, 2) for name, told in times.items()},
        }
        for id, node in plan.nodes.items()
        if memory[id]
    }
    return {
        "parameters": size.parameters,
        "ruled_out": dict(plan.ruled_out),
        "stages": rows,
    }


def _seventy() -> Any:
    from featherweight.spec import ModelSize

    layers, hidden, inner, keys, table = (SEVENTY[name] for name in SEVENTY)
    block = 2 * hidden * (hidden + keys) + 3 * hidden * inner
    columns = layers * (6 * hidden + inner)
    return ModelSize(
        layers * block + 2 * table * hidden,
        7 * layers,
        columns,
        table=table * hidden,
        widest=inner,
        layers=layers,
    )


def benchmark() -> Tree:
    """All that needs no checkpoint of somebody's own."""
    return {
        "variants": variants([4, 16, 64]),
        "workers": workers([1, 2]),
        "registry": registry([100, 1000]),
        "paper": paper(),
    }


if __name__ == "__main__":
    part, *words = sys.argv[1:]
    parts = {"variants": variants, "workers": workers, "registry": registry}
    if part == "paper":
        found = paper()
    elif part == "ray":
        found = ray(*map(int, words))
    else:
        found = models(Path(words[0]), words[1]) if part == "models" else parts[part]([int(word) for word in words])
    print(json.dumps(found, indent=1))
