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
from featherweight.measure.benchmark_files import HARNESS, WRITTEN, documents, shots, task_file
from featherweight.measure.spec import BenchmarkSpec
from featherweight.runtimes.client import Worker
from featherweight.runtimes.generation_settings import GenerationSettings

KINDS = ("multiple_choice", "loglikelihood", WRITTEN)
SPLIT, FRONT = "local", "front"
SHOTS_SEED = 1234
"""The harness's own for the examples in front: what every variant is asked is the same, and what `lm_eval` asks."""
COUNTED = ("acc", "exact_match")
"""The metrics that are 1 for a right answer and 0 for another."""


def hits(worker: Worker, folder: Path, benchmarks: Mapping[str, BenchmarkSpec]) -> dict[str, tuple[float, ...]]:
    """For each benchmark 1.0 for every example that is answered rightly (the task's `acc`, or `exact_match`), 0.0 for others.

    In the file's order.

    folder: has the tokenizer. Raises RecipeError for a task of another kind, DataError for a file that is no such task's.
    """
    tokenizer = load_tokenizer(folder)
    settings = GenerationSettings.read(folder)
    return {name: _hits(worker, tokenizer, settings, one.task or name, one) for name, one in benchmarks.items()}


def _hits(worker: Worker, tokenizer: Any, settings: GenerationSettings, name: str, spec: BenchmarkSpec) -> tuple[float, ...]:
    from lm_eval.evaluator import evaluate

    from featherweight.runtimes.harness_model import HarnessModel

    with _silent():
        tasks = local_task(name, documents(spec), spec)
    kind = tasks["tasks"][name].config.output_type
    if kind not in KINDS:
        raise RecipeError(f"workload.benchmarks: {name} is a task of {kind}; take one of {' or '.join(KINDS)}")
    if spec.chat and not tokenizer.chat_template:
        raise RecipeError(
            f"workload.benchmarks: {name} is to be asked as a chat, and the checkpoint has no chat template; leave chat out"
        )
    model = HarnessModel(worker, tokenizer, kind == "loglikelihood", settings)
    told = {"apply_chat_template": spec.chat, "fewshot_as_multiturn": spec.chat}
    with _silent():
        found = evaluate(lm=model, task_dict=tasks, bootstrap_iters=0, log_samples=True, **told)
    return _right(name, found["samples"][name], spec.filter)


def _right(name: str, samples: list[dict[str, Any]], filtered: str | None) -> tuple[float, ...]:
    """The counts of each example, read in the way that is asked for, or in the task's first."""
    ways = list(dict.fromkeys(one["filter"] for one in samples))
    if filtered is not None and filtered not in ways:
        raise RecipeError(f"workload.benchmarks: {name} reads its answers by {' or '.join(ways)}, not by {filtered}")
    read = sorted((one for one in samples if one["filter"] == (filtered or ways[0])), key=lambda one: one["doc_id"])
    metric = next((metric for metric in COUNTED if metric in read[0]), None)
    if metric is None:
        raise RecipeError(f"workload.benchmarks: {name} counts no right answers; take one whose metric is {' or '.join(COUNTED)}")
    return tuple(float(one[metric]) for one in read)


@contextmanager
def _silent() -> Iterator[None]:
    """Without the harness's bars and hints, which would tear the view of the progress; its errors are raised."""
    logging.getLogger(HARNESS).setLevel(logging.ERROR)
    with redirect_stderr(StringIO()):
        yield


def local_task(name: str, rows: list[dict[str, Any]], spec: BenchmarkSpec) -> Any:
    """The harness's task of that name, whose data set is `rows`; nothing is asked of a network."""
    from datasets import Dataset
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    front = shots(spec)
    data = {SPLIT: Dataset.from_list(rows)} | ({FRONT: Dataset.from_list(front)} if front else {})
    splits = {"training_split": None, "validation_split": None, "fewshot_split": FRONT if front else None, "test_split": SPLIT}
    local: dict[str, Any] = {"custom_dataset": lambda **_: data, "num_fewshot": spec.shots or 0, **splits}
    stated = load_yaml(task_file(name))
    if stated.get("output_type") == WRITTEN:
        local["generation_kwargs"] = {**stated.get("generation_kwargs", {}), "max_gen_toks": spec.new_tokens}
    try:
        tasks = TaskManager(include_defaults=False).load([stated | local])
    except KeyError as error:
        raise RecipeError(f"workload.benchmarks.{name}: its file lacks what the task reads: {one_line(error)}") from error
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(SHOTS_SEED)
    return tasks
