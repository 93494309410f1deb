"""export: a checkpoint becomes a folder that an engine serves, its modules or its weights in the engine's own layout."""

from __future__ import annotations

from pathlib import Path

from featherweight.progress import Metrics, Progress
from featherweight.runtimes.spec import ExportSpec
from featherweight.runtimes.writing import write_served
from tasks.stage import stage


@stage("export", version="3", libraries=("torch", "transformers"), hardware=True, native=True)
def export(
    spec: ExportSpec,
    *,
    checkpoint: Path,
    calibration: Path,
    out: Path,
    draft: Path | None = None,
    seed: int = 0,
    progress: Progress = Progress(),
) -> Metrics:
    """Write to `out` what `spec.engine` serves, and compare it with PyTorch; see featherweight.runtimes.writing.write_served.

    draft: what the smaller model is served by that drafts tokens for it, where one does.
    Metrics: `parity_max_abs`, `parity_mean_abs`, `parity_bound` (nats), and where the engine rounds activations also
    `parity_weights_max_abs`, the same with activations in float. None for what is the reference itself. Of the adapters beside it
    `parity_adapters_max_abs`.
    """
    return write_served(spec, checkpoint=checkpoint, calibration=calibration, out=out, draft=draft, seed=seed, progress=progress)
