"""prune: a smaller or sparser checkpoint, by one of the methods of tasks/pruners."""

from __future__ import annotations

from pathlib import Path

from featherweight import surgery, training
from featherweight.progress import Progress
from featherweight.recipe import PruneSpec
from tasks.pruners import METHODS
from tasks.pruners.job import Job
from tasks.stage import Metrics, stage


@stage("prune", version="1", libraries=("torch", "transformers", "torch-pruning", "llmcompressor"))
def prune(
    spec: PruneSpec, *, checkpoint: Path, calibration: Path, out: Path, seed: int = 0, progress: Progress = Progress()
) -> Metrics:
    """Prune `checkpoint` by `spec.method`, judging by `spec.samples` blocks of `calibration`.

    Metrics: `parameters_before`, `parameters`, `loss_before`, `loss_after` (nats per token on the calibration blocks, the
    latter of the saved checkpoint read again), and the method's own. Recovery training is the stage after this.
    Raises RecipeError for what no engine could load, StageError for an architecture that the method cannot cut.
    """
    job = Job(spec, checkpoint, calibration, out, seed, progress)
    surgery.require_context(job.config, spec.sequence, "prune")
    pruned = METHODS[spec.method](job)
    surgery.save_model(pruned.model, out, checkpoint)
    before = {"parameters_before": pruned.parameters_before, "loss_before": pruned.loss_before, **pruned.metrics}
    blocks = job.blocks
    del job, pruned  # the model goes before its copy comes
    saved = surgery.load_model(out)
    return {**before, "parameters": surgery.parameters(saved), "loss_after": training.mean_loss(saved, blocks)}
