"""compile: a checkpoint becomes a graph that an engine serves."""

from __future__ import annotations

from pathlib import Path

from featherweight.progress import Metrics, Progress
from featherweight.runtimes.spec import CompileSpec
from featherweight.runtimes.writing import write_served
from tasks.stage import stage


@stage("compile", version="2", libraries=("torch", "transformers"), hardware=True, native=True)
def compile(
    spec: CompileSpec, *, checkpoint: Path, calibration: Path, out: Path, seed: int = 0, progress: Progress = Progress()
) -> Metrics:
    """Write to `out` what `spec.engine` serves, and compare it with PyTorch: the same as export, with the same metrics."""
    return write_served(spec, checkpoint=checkpoint, calibration=calibration, out=out, seed=seed, progress=progress)
