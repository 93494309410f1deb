"""The data gates: what must hold of the text before anything is trained on it, and of the metrics before a winner is chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from featherweight.errors import DataError, StageError
from featherweight.progress import Metrics, Progress
from featherweight.text.expectations import Validation, check_texts
from featherweight.text.expectations import check_metrics as metrics_suite
from featherweight.text.spec import GateSpec
from tasks.stage import stage


@stage("gate", libraries=("great-expectations",))
def gate(
    spec: GateSpec,
    *,
    calibration: Path,
    evaluation: Path,
    out: Path,
    train: Path | None = None,
    seed: int = 0,
    progress: Progress = Progress(),
) -> Metrics:
    """Check the text folders; writes `validation.json` and `validation.html`, also where it then raises.

    Raises DataError, naming the documents, if a critical expectation fails: a split is empty, a document is blank or binary,
    or an evaluation document stands, whole or by more than `spec.max_overlap` of its 13-word sequences, in another split.
    """
    progress.note("checking the text")
    folders = {"train": train, "calibration": calibration, "evaluation": evaluation}
    validation = check_texts({split: folder for split, folder in folders.items() if folder is not None}, spec.max_overlap)
    validation.write(out)
    validation.raise_critical(DataError, "take these documents out of one of the two, or see validation.html")
    return _metrics(validation)


def check_metrics(table: Iterable[Mapping[str, Any]], out: Path | None = None) -> Validation:
    """Check the metrics of all variants (`name` and the keys of featherweight/report/result.py) before a winner is chosen.

    Writes `metrics.json` and `metrics.html` into `out`. Raises StageError, naming the variants, if a critical one fails.
    """
    validation = metrics_suite(table)
    if out is not None:
        validation.write(out, "metrics")
    validation.raise_critical(StageError, "a variant with such numbers cannot be compared; see metrics.html")
    return validation


def _metrics(validation: Validation) -> Metrics:
    """Every fact and the number of warnings, flat: `evaluation_documents`, `evaluation_largest_overlap_with_train` ..."""
    facts = {
        f"{suite.name.removesuffix(' text')}_{name}".replace(" ", "_"): value
        for suite in validation.suites
        for name, value in suite.facts.items()
    }
    warnings = sum(not found.critical for suite in validation.suites for found in suite.findings)
    return {**facts, "expectations": sum(suite.evaluated for suite in validation.suites), "warnings": warnings}
