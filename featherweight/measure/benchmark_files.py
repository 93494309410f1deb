"""Benchmarks of lm-evaluation-harness on files that lie here: whether they can be run, and what identifies them."""

from __future__ import annotations

import json
import re
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from featherweight.errors import DataError, RecipeError, ToolchainError
from featherweight.measure.spec import BenchmarkSpec, WorkloadSpec
from featherweight.store.artifact import file_sha256

HARNESS = "lm_eval"
WRITTEN = "generate_until"
"""The kind of the harness's tasks that have texts written."""
TOKEN_BYTES = 4
"""About so many bytes of a text are a token."""


class Harness:
    """lm-evaluation-harness as a part of a measurement."""

    libraries = ("lm-eval",)


def fingerprint(spec: WorkloadSpec) -> str | None:
    """Of the harness and the files that a workload's benchmarks read; None where it has none. Raises as `require` does."""
    if not spec.benchmarks:
        return None
    require(spec)
    files = [name for one in spec.benchmarks.values() for name in one.files]
    digests = [file_sha256(Path(name)) for name in files]
    return json.dumps([HARNESS, version(HARNESS), *digests])


def require(spec: WorkloadSpec) -> None:
    """Raise ToolchainError without the harness, RecipeError for a task that it lacks, DataError for a file that is not there."""
    if spec.benchmarks and find_spec(HARNESS) is None:
        raise ToolchainError("workload.benchmarks: lm-evaluation-harness is not installed; pip install 'featherweight[benchmarks]'")
    for name, one in spec.benchmarks.items():
        task_file(one.task or name)
        for file in one.files:
            if not Path(file).is_file():
                raise DataError(f"workload.benchmarks.{name}: there is no file {file}")


@cache
def task_file(task: str) -> Path:
    """Where the harness says what a task is; looked for in its files, since its own index of all takes seconds of imports."""
    found = find_spec(HARNESS)
    stated = re.compile(rf"^task: *{re.escape(task)} *$", re.MULTILINE)
    for root in (found.submodule_search_locations or ()) if found else ():
        for path in sorted(Path(root, "tasks").rglob("*.yaml")):
            if stated.search(path.read_text(encoding="utf-8", errors="replace")):
                return path
    raise RecipeError(f"workload.benchmarks: lm-evaluation-harness has no task {task}; 'lm_eval ls tasks' lists them")


def writes(name: str, spec: BenchmarkSpec) -> bool:
    """Whether a benchmark has texts written; by the task's own file, False where that does not say."""
    try:
        text = task_file(spec.task or name).read_text(encoding="utf-8", errors="replace")
    except RecipeError:
        return False
    return re.search(rf"^output_type: *{WRITTEN} *$", text, re.MULTILINE) is not None


def amount(spec: BenchmarkSpec) -> tuple[int, float]:
    """How many examples there are, none where the file is missing; and about how many tokens each has with what stands in front."""
    examples, size = _lines(spec.file)
    _, front = _lines(spec.examples) if spec.examples else (0, 0.0)
    return min(examples, spec.limit or examples), (size + (spec.shots or 0) * front) / TOKEN_BYTES


def _lines(name: str) -> tuple[int, float]:
    """How many lines a file has that are not empty, and the mean of their bytes."""
    try:
        lines = [line for line in Path(name).read_bytes().splitlines() if line.strip()]
    except OSError:
        return 0, 0.0
    return len(lines), sum(map(len, lines)) / max(1, len(lines))


def documents(spec: BenchmarkSpec) -> list[dict[str, Any]]:
    """The benchmark's examples: a JSON object each line, `label` from the file of labels. Raises DataError for anything else."""
    try:
        rows = _objects(spec.file)
        if spec.labels:
            labels = [int(line) for line in Path(spec.labels).read_text().split()]
            rows = [{**row, "label": label} for row, label in zip(rows, labels, strict=True)]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{spec.file}: no benchmark of a JSON object a line, and a label a line beside it: {error}") from error
    if not rows:
        raise DataError(f"{spec.file} holds no example")
    return rows[: spec.limit]


def shots(spec: BenchmarkSpec) -> list[dict[str, Any]]:
    """Those that may stand in front of a prompt. Raises DataError where the file holds too few, or anything else."""
    try:
        rows = _objects(spec.examples) if spec.examples else []
    except (OSError, ValueError) as error:
        raise DataError(f"{spec.examples}: no examples of a JSON object a line: {error}") from error
    if len(rows) < (spec.shots or 0):
        raise DataError(f"{spec.examples} holds {len(rows)} examples, and {spec.shots} are to stand in front of each prompt")
    return rows


def _objects(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
