"""Going through the matrix: checkpoints first, then an engine at a time; each cell in a process of its own, with a time limit.

What every cell imports is imported here once, before the processes part. What the same code has found of the same bytes is kept.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from multiprocessing.context import BaseContext
from pathlib import Path
from time import monotonic
from typing import Any

import torch  # noqa: F401 - what every cell needs is imported before the processes part
import transformers.generation
import transformers.modeling_utils  # noqa: F401

import tasks.load
import tasks.quantize  # noqa: F401
from conformance import cell, vllm_client
from conformance.cell import LOAD, QUANTIZE, Folders
from conformance.outcome import KINDS, Matrix, Outcome, bytes_of, stamp
from conformance.tiny import Case, made_with

MADE = "made.json"
"""In a case's folder: what each part of it was made with."""
WALL = 6
"""So many times its limit in CPU seconds may a cell take by the clock, on a machine that does other things too."""


GRACE = 5
"""CPU seconds between the signal that a cell has used up its own, and the kernel's end of it."""


@dataclass
class Run:
    """How the cells are found. limit_s: CPU seconds of one; work: where checkpoints are kept from one run to the next."""

    matrix: Matrix
    work: Path
    limit_s: float
    redo: bool = False

    def __post_init__(self) -> None:
        # Inductor's pool of compilers takes longer to start than to be of use.
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
        self.fork: BaseContext = multiprocessing.get_context("fork")

    def all(self, cases: Iterable[Case], columns: list[str]) -> None:
        """Find every cell of `cases` in `columns` that this code has not found yet; each is kept at once."""
        every, engines = list(cases), [column for column in columns if column not in (LOAD, QUANTIZE)]
        ready = [(case, folders) for case in every if (folders := self._checkpoints(case, columns))]
        with vllm_client.forking() if any(column.startswith("vllm ") for column in engines) else nullcontext():
            for column in engines:
                began = monotonic()
                for case, folders in ready:
                    self._serve(case, folders, column)
                _say(f"{column}, {(monotonic() - began) / 60:.1f} min: {_counts(self.matrix, every, column)}")

    def _checkpoints(self, case: Case, columns: list[str]) -> Folders | None:
        """The case's folder with its checkpoints in it, and the answers of the plan; None where none can be loaded."""
        folders = Folders(self.work / re.sub(r"\W+", "-", case.name))
        folders.root.mkdir(parents=True, exist_ok=True)
        made = _Made(folders.root / MADE)
        key = made_with(case)
        if not made.is_by("model", key):
            shutil.rmtree(folders.root)
            folders.root.mkdir()
            if (outcome := self._apart(folders, cell.built, case)).kind != "exact":
                self._stop(case, columns, outcome)
                return None
            made.by("model", key)
        for work, column, source in ((cell.loaded, LOAD, folders.model), (cell.quantized, QUANTIZE, folders.checkpoint)):
            outcome = self._stage(case, folders, work, column, bytes_of(source), made)
            if column == LOAD and outcome.kind not in ("exact", "within bound"):
                self._stop(case, columns, outcome)
                return None
        self._plan(case, folders, [column for column in columns if column not in (LOAD, QUANTIZE)])
        return folders

    def _stage(self, case: Case, folders: Folders, work: Callable[..., Outcome], column: str, source: str, made: _Made) -> Outcome:
        """What a stage makes of the bytes `source`, unless it lies there already."""
        found = self.matrix.get(case.name, column)
        key = stamp(column) + source
        if found and not self.redo and made.is_by(column, key) and self.matrix.is_current(case.name, column, source):
            return found
        outcome = self._apart(folders, work, case)
        outcome = replace(outcome, moment="before work") if outcome.kind == "refused" else outcome
        self.matrix.put(case.name, column, outcome, source)
        made.by(column, key)
        return outcome

    def _stop(self, case: Case, columns: list[str], outcome: Outcome) -> None:
        """Nothing of a checkpoint that cannot be made, or loaded, is served."""
        for column in columns:
            self.matrix.put(case.name, column, outcome, "")

    def _plan(self, case: Case, folders: Folders, columns: list[str]) -> None:
        """What the plan says of every engine, which is asked anew each time: it costs little, and no key knows all of it."""
        said = self._answer(folders, cell.planned, case, folders, columns)
        if isinstance(said, Outcome):
            self._stop(case, columns, said)
            return
        for column, outcome in said.items():
            before = self.matrix.get(case.name, column)
            if outcome is not None:
                self.matrix.put(case.name, column, Outcome(**outcome), folders.source(column))
            elif before and (before.kind == "not offered" or before.moment == "before work"):
                self.matrix.drop(case.name, column)

    def _serve(self, case: Case, folders: Folders, column: str) -> None:
        source, found = folders.source(column), self.matrix.get(case.name, column)
        planned = found is not None and (found.kind == "not offered" or found.moment == "before work")
        more = found is not None and found.moment == "at its limit" and found.seconds < self.limit_s
        if planned or (not self.redo and not more and self.matrix.is_current(case.name, column, source)):
            return
        engine, _, form = column.rpartition(" ")
        outcome = self._apart(folders, cell.served, case, engine, form)
        self.matrix.put(case.name, column, outcome, source)
        if outcome.kind == "defect" or outcome.moment in ("at export", "by the gate", "at its limit"):
            _say(f"  {column}, {case.name}: {outcome.kind} {outcome.moment} {outcome.reason}")

    def _apart(self, folders: Folders, work: Callable[..., Outcome], case: Case, *column: str) -> Outcome:
        found = self._answer(folders, _found, work, case, folders, *column)
        return found if isinstance(found, Outcome) else Outcome(**found)

    def _answer(self, folders: Folders, work: Callable[..., Any], *arguments: Any) -> dict[str, Any] | Outcome:
        return apart(self.fork, self.limit_s, folders.root, work, *arguments)


class _Made:
    """With what each part of a folder was made, kept beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def is_by(self, part: str, key: str) -> bool:
        return self.path.exists() and json.loads(self.path.read_text()).get(part) == key

    def by(self, part: str, key: str) -> None:
        told = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.path.write_text(json.dumps(told | {part: key}))


def apart(fork: BaseContext, limit_s: float, folder: Path, work: Callable[..., Any], *arguments: Any) -> dict[str, Any] | Outcome:
    """What `work` answers in a process of its own, as JSON in a file in `folder`; a defect where it dies or hangs.

    Nothing is known of a cell that used up its CPU seconds.
    """
    answer = folder / "answer.json"
    answer.unlink(missing_ok=True)
    process = fork.Process(target=_work, args=(work, arguments, answer, limit_s))  # type: ignore[attr-defined]
    process.start()
    process.join(limit_s * WALL)
    if process.is_alive():
        process.kill()
        process.join()
        return Outcome("defect", f"not done after {limit_s * WALL:.0f} s", seconds=limit_s * WALL)
    if process.exitcode == -signal.SIGXCPU:
        reason = f"not done after {limit_s:.0f} CPU seconds; --limit gives it more"
        return Outcome("not run", reason, "at its limit", seconds=limit_s)
    if not answer.exists():
        return Outcome("defect", f"its process died with exit code {process.exitcode}")
    told: dict[str, Any] = json.loads(answer.read_text().replace(f"{folder}/", ""))  # no machine's own path in a reason
    return told


def _work(work: Callable[..., Any], arguments: tuple[Any, ...], answer: Path, limit_s: float) -> None:
    """In the process of a cell. What libraries print goes to a file beside the answer."""
    seconds = max(1, round(limit_s))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + GRACE))  # the kernel kills at the second, without telling why
    log = os.open(answer.with_name("log.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    answer.write_text(json.dumps(work(*arguments)))


def _found(work: Callable[..., Outcome], case: Case, folders: Folders, *column: str) -> dict[str, Any]:
    return asdict(cell.found(lambda: work(case, folders, *column)))


def _counts(matrix: Matrix, cases: list[Case], column: str) -> str:
    outcomes = [matrix.get(case.name, column) for case in cases]
    counts = {kind: sum(outcome is not None and outcome.kind == kind for outcome in outcomes) for kind in KINDS}
    return ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
