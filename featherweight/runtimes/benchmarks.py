"""The accuracy of a served variant in lm-evaluation-harness's own tasks, on files that lie here."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from featherweight.checkpoint.tokenizer import load_tokenizer
from featherweight.errors import RecipeError, one_line
from featherweight.measure.benchmark_files import HARNESS, documents, task_file
from featherweight.measure.spec import BenchmarkSpec
from featherweight.runtimes.client import Worker

KINDS = ("multiple_choice", "loglikelihood")
SPLIT = "local"


def hits(worker: Worker, folder: Path, benchmarks: Mapping[str, BenchmarkSpec]) -> dict[str, tuple[float, ...]]:
    """For each benchmark 1.0 for every example that is answered rightly (the task's `acc`), 0.0 for others, in the file's order.

    folder: has the tokenizer. Raises RecipeError for a task of another kind, DataError for a file that is no such task's.
    """
    tokenizer = load_tokenizer(folder)
    return {name: _hits(worker, tokenizer, one.task or name, one) for name, one in benchmarks.items()}


def _hits(worker: Worker, tokenizer: Any, name: str, spec: BenchmarkSpec) -> tuple[float, ...]:
    from lm_eval.evaluator import evaluate

    from featherweight.runtimes.harness_model import HarnessModel

    with _silent():
        tasks = local_task(name, documents(spec))
    kind = tasks["tasks"][name].config.output_type
    if kind not in KINDS:
        raise RecipeError(f"workload.benchmarks: {name} is a task of {kind}; take one of {' or '.join(KINDS)}")
    model = HarnessModel(worker, tokenizer, greedy=kind == "loglikelihood")
    with _silent():
        found = evaluate(lm=model, task_dict=tasks, bootstrap_iters=0, log_samples=True)
    samples = sorted(found["samples"][name], key=lambda one: one["doc_id"])
    if any("acc" not in one for one in samples):
        raise RecipeError(f"workload.benchmarks: {name} counts no right answers; take one whose metric is acc")
    return tuple(float(one["acc"]) for one in samples)


@contextmanager
def _silent() -> Iterator[None]:
    """Without the harness's bars and hints, which would tear the view of the progress; its errors are raised."""
    logging.getLogger(HARNESS).setLevel(logging.ERROR)
    with redirect_stderr(StringIO()):
        yield


def local_task(name: str, rows: list[dict[str, Any]]) -> Any:
    """The harness's task of that name, without examples in front, whose data set is `rows`; nothing is asked of a network."""
    from datasets import Dataset
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    splits = {"training_split": None, "validation_split": None, "fewshot_split": None, "test_split": SPLIT}
    local = {"custom_dataset": lambda **_: {SPLIT: Dataset.from_list(rows)}, "num_fewshot": 0, **splits}
    try:
        return TaskManager(include_defaults=False).load([load_yaml(task_file(name)) | local])
    except KeyError as error:
        raise RecipeError(f"workload.benchmarks.{name}: its file lacks what the task reads: {one_line(error)}") from error
