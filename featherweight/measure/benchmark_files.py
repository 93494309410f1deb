"""Benchmarks of lm-evaluation-harness on files that lie here: whether they can be run, and what identifies them."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from featherweight.errors import DataError, RecipeError, ToolchainError
from featherweight.measure.spec import BenchmarkSpec, WorkloadSpec
from featherweight.store.artifact import file_sha256

HARNESS = "lm_eval"


class Harness:
    """lm-evaluation-harness as a part of a measurement."""

    libraries = ("lm-eval",)


def fingerprint(spec: WorkloadSpec) -> str | None:
    """Of the harness and the files that a workload's benchmarks read; None where it has none. Raises as `require` does."""
    if not spec.benchmarks:
        return None
    require(spec)
    files = [name for one in spec.benchmarks.values() for name in (one.file, one.labels) if name]
    digests = [file_sha256(Path(name)) for name in files]
    return json.dumps([HARNESS, version(HARNESS), *digests])


def require(spec: WorkloadSpec) -> None:
    """Raise ToolchainError without the harness, RecipeError for a task that it lacks, DataError for a file that is not there."""
    if spec.benchmarks and find_spec(HARNESS) is None:
        raise ToolchainError("workload.benchmarks: lm-evaluation-harness is not installed; pip install 'featherweight[benchmarks]'")
    for name, one in spec.benchmarks.items():
        task_file(one.task or name)
        for file in filter(None, (one.file, one.labels)):
            if not Path(file).is_file():
                raise DataError(f"workload.benchmarks.{name}: there is no file {file}")


def task_file(task: str) -> Path:
    """Where the harness says what a task is; looked for in its files, since its own index of all takes seconds of imports."""
    found = find_spec(HARNESS)
    stated = re.compile(rf"^task: *{re.escape(task)} *$", re.MULTILINE)
    for root in (found.submodule_search_locations or ()) if found else ():
        for path in sorted(Path(root, "tasks").rglob("*.yaml")):
            if stated.search(path.read_text(encoding="utf-8", errors="replace")):
                return path
    raise RecipeError(f"workload.benchmarks: lm-evaluation-harness has no task {task}; 'lm_eval ls tasks' lists them")


def documents(spec: BenchmarkSpec) -> list[dict[str, Any]]:
    """The benchmark's examples: a JSON object each line, `label` from the file of labels. Raises DataError for anything else."""
    try:
        lines = Path(spec.file).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        if spec.labels:
            labels = [int(line) for line in Path(spec.labels).read_text().split()]
            rows = [{**row, "label": label} for row, label in zip(rows, labels, strict=True)]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{spec.file}: no benchmark of a JSON object a line, and a label a line beside it: {error}") from error
    if not rows:
        raise DataError(f"{spec.file} holds no example")
    return rows[: spec.limit]
