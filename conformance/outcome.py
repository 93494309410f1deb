"""What becomes of one cell of the matrix: a checkpoint, an engine, and what is done with them. And the file that keeps them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from featherweight.runtimes.catalog import RUNTIMES
from tasks.cache_key import code_digest

Kind = Literal["exact", "within bound", "refused", "not offered", "not run", "defect"]
Moment = Literal["", "before work", "at export", "by the gate", "at its limit"]
KINDS: tuple[Kind, ...] = ("exact", "within bound", "refused", "not offered", "not run", "defect")
LIBRARIES = ("transformers", "torch", "ctranslate2", "onnxruntime-genai", "onnxruntime", "torchao")
STAGES = {"load": "tasks.load:load", "quantize int8": "tasks.quantize:quantize"}
KEYS = ("stamp", "source")
"""What is kept beside an outcome: the code that found it, and the digest of the checkpoint that it was found of."""
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Outcome:
    """One cell. reason: of what is not served, in one line; moment: when a refusal came, or that the cell had used up its CPU
    seconds, and nothing is known of it. max_nats: the largest difference from transformers' eager float32 in log-probabilities, of
    what is served; mean_nats: the average one.
    """

    kind: Kind
    reason: str = ""
    moment: Moment = ""
    max_nats: float | None = None
    mean_nats: float | None = None
    seconds: float = 0.0
    cpu_seconds: float = 0.0


@cache
def stamp(column: str) -> str:
    """What a cell of `column` was found with: the code that it runs, that of its engine's folder, and the versions."""
    digest = hashlib.sha256(json.dumps([_slices(column), versions()], sort_keys=True).encode())
    for path in sorted([Path(__file__).with_name("cell.py"), *_engine_files(column)]):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _slices(column: str) -> list[str]:
    engine = column.rpartition(" ")[0]
    return [code_digest(STAGES[column] if column in STAGES else RUNTIMES.reference(engine))]


def _engine_files(column: str) -> list[Path]:
    """The folder that an engine is declared in, whose refusals no slice of code knows."""
    if column in STAGES:
        return []
    module = RUNTIMES.reference(column.rpartition(" ")[0]).partition(":")[0]
    return list((ROOT / Path(*module.split(".")).parent).glob("*.py"))


def bytes_of(folder: Path) -> str:
    """Digest of the files in a folder; of no folder that of none."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of the libraries that shape the matrix."""
    return {name: version(name) for name in LIBRARIES}


@dataclass
class Matrix:
    """Outcomes by case and column, kept in a file as they are found, with the stamp of what found each."""

    path: Path
    cells: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> Matrix:
        """What is in the file, nothing where there is none."""
        matrix = cls(path)
        if path.exists():
            matrix.cells = json.loads(path.read_text())["cells"]
        return matrix

    def get(self, case: str, column: str) -> Outcome | None:
        """What was found of a cell, with whatever code."""
        found = self.cells.get(case, {}).get(column)
        return None if found is None else Outcome(**{name: value for name, value in found.items() if name not in KEYS})

    def is_current(self, case: str, column: str, source: str | None = None) -> bool:
        """Whether this very code and these versions found the cell, of the bytes `source` where they are told."""
        found = self.cells.get(case, {}).get(column, {})
        return found.get("stamp") == stamp(column) and source in (None, found.get("source"))

    def put(self, case: str, column: str, outcome: Outcome, source: str) -> None:
        """Keep an outcome, on disk at once. source: the digest of what was worked on."""
        self.cells.setdefault(case, {})[column] = asdict(outcome) | {"stamp": stamp(column), "source": source}
        self._write()

    def drop(self, case: str, column: str) -> None:
        """Forget a cell that is no longer what it was."""
        del self.cells[case][column]
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".new")
        beside.write_text(json.dumps({"versions": versions(), "cells": self.cells}, indent=1) + "\n")
        beside.replace(self.path)
