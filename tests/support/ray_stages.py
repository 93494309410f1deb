"""Stages that a Ray cluster is tried with: what they are asked stands in the `source` of their spec."""

from __future__ import annotations

import os
import time
from pathlib import Path

from featherweight.checkpoint.spec import LoadSpec
from featherweight.errors import DataError
from featherweight.progress import Metrics, Progress
from tasks.stage import stage


@stage("told")
def told(spec: LoadSpec, *, out: Path, seed: int, progress: Progress) -> Metrics:
    """Says which process it ran in."""
    (out / "file").write_text("made")
    return {"pid": os.getpid(), "ppid": os.getppid()}


@stage("refused")
def refused(spec: LoadSpec, *, out: Path, seed: int, progress: Progress) -> Metrics:
    """Refuses its data."""
    raise DataError("this text is none")


@stage("waiting")
def waiting(spec: LoadSpec, *, out: Path, seed: int, progress: Progress) -> Metrics:
    """Writes the process that started its own into a file, and ends once another is there; within two minutes."""
    folder = Path(str(spec.source))
    (out / "file").write_text("made")
    (folder / "part").write_text(str(os.getppid()))
    (folder / "part").rename(folder / "started")
    for _ in range(1200):
        if (folder / "go").exists():
            return {"pid": os.getpid()}
        time.sleep(0.1)
    raise DataError("nobody said go")


@stage("crashing")
def crashing(spec: LoadSpec, *, out: Path, seed: int, progress: Progress) -> Metrics:
    """Ends its process as a native library does."""
    os.kill(os.getpid(), 11)
    return {}
