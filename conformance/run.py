"""Going through the matrix: each cell in a process of its own, with a time limit; what the same code has found is kept."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from multiprocessing.context import BaseContext
from pathlib import Path
from time import monotonic
from typing import Any

from conformance import cell
from conformance.cell import LOAD, QUANTIZE, Folders
from conformance.outcome import KINDS, Matrix, Outcome
from conformance.tiny import Case

PRELOADED = ["conformance.preload", "conformance.run"]
"""What the processes of the cells share from the start, instead of importing it in each."""


def run(matrix: Matrix, cases: Iterable[Case], columns: list[str], limit_s: float, *, redo: bool = False) -> None:
    """Find every cell of `cases` in `columns` that this code has not found yet; each is kept at once."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # its pool of compilers takes longer to start than to be of use
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(PRELOADED)
    every, began = list(cases), monotonic()
    for number, case in enumerate(every, 1):
        wanted = [column for column in columns if redo or not matrix.is_current(case.name, column)]
        if wanted:
            _run_case(matrix, case, wanted, limit_s, fork)
        _say(f"[{number}/{len(every)}, {(monotonic() - began) / 60:.0f} min] {case.name}: {_counts(matrix, case, columns)}")


def _run_case(matrix: Matrix, case: Case, columns: list[str], limit_s: float, fork: BaseContext) -> None:
    with tempfile.TemporaryDirectory() as folder:
        folders = Folders(Path(folder))
        stopped: Outcome | None = None
        for work, column in ((cell.built, None), (cell.loaded, LOAD), (cell.quantized, QUANTIZE)):
            outcome = stopped or apart(fork, limit_s, folders.root, work, case, folders)
            outcome = replace(outcome, moment="before work") if outcome.kind == "refused" else outcome
            if column in columns:
                matrix.put(case.name, column, outcome)
            if outcome.kind not in ("exact", "within bound") and work is not cell.quantized:
                stopped = outcome
        for column in (column for column in columns if column not in (LOAD, QUANTIZE)):
            engine, _, form = column.rpartition(" ")
            outcome = stopped or apart(fork, limit_s, folders.root, cell.served, case, folders, engine, form)
            matrix.put(case.name, column, outcome)


def apart(fork: BaseContext, limit_s: float, folder: Path, work: Callable[..., Outcome], *arguments: Any) -> Outcome:
    """The outcome of `work` in a process of its own, which answers by a file in `folder`; dying or taking too long is a defect."""
    answer = folder / "answer.json"
    answer.unlink(missing_ok=True)
    process = fork.Process(target=_work, args=(work, arguments, answer))  # type: ignore[attr-defined]
    process.start()
    process.join(limit_s)
    if process.is_alive():
        process.kill()
        process.join()
        return Outcome("defect", f"not done after {limit_s:.0f} s", seconds=limit_s)
    if not answer.exists():
        return Outcome("defect", f"its process died with exit code {process.exitcode}")
    return Outcome(**json.loads(answer.read_text().replace(f"{folder}/", "")))  # no machine's own path in a reason


def _work(work: Callable[..., Outcome], arguments: tuple[Any, ...], answer: Path) -> None:
    """In the process of a cell. What libraries print goes to a file beside the answer."""
    log = os.open(answer.with_name("log.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    answer.write_text(json.dumps(asdict(cell.found(lambda: work(*arguments)))))


def _counts(matrix: Matrix, case: Case, columns: list[str]) -> str:
    outcomes = [(column, matrix.get(case.name, column)) for column in columns]
    counts = {kind: sum(outcome is not None and outcome.kind == kind for _, outcome in outcomes) for kind in KINDS}
    told = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    defects = [f"\n    {column}: {outcome.reason}" for column, outcome in outcomes if outcome and outcome.kind == "defect"]
    return told + "".join(defects)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
