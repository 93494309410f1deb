"""prune: a smaller or sparser checkpoint, by one of the methods of featherweight/pruning."""

from __future__ import annotations

from pathlib import Path

from featherweight.checkpoint import opening, saving
from featherweight.errors import RecipeError
from featherweight.model.architecture import task_of
from featherweight.model.parent import Parent
from featherweight.progress import Metrics, Progress
from featherweight.pruning.catalog import PRUNERS
from featherweight.pruning.interface import PruningInput
from featherweight.pruning.spec import PruneSpec
from featherweight.training.losses import mean_loss
from tasks.stage import stage


@stage("prune", version="1", libraries=("torch", "transformers"))
def prune(
    spec: PruneSpec,
    *,
    checkpoint: Path,
    calibration: Path,
    out: Path,
    text: Path | None = None,
    seed: int = 0,
    progress: Progress = Progress(),
) -> Metrics:
    """Prune `checkpoint` by `spec.method`, judging by `spec.samples` blocks of `calibration`. text: what the recipe trains on.

    Metrics: `parameters_before`, `parameters`, `loss_before`, `loss_after` (nats per token on the calibration blocks, the
    latter of the saved checkpoint read again), and the method's own. Recovery training is the stage after this.
    Raises RecipeError for what no engine could load, StageError for an architecture that the method cannot cut.
    """
    given = PruningInput(spec, checkpoint, calibration, out, seed, progress, text)
    if reason := spec.refusal(Parent(task_of(given.config), given.config.model_type)):
        raise RecipeError(f"prune: {reason}")
    opening.require_context(given.config, spec.sequence, "prune")
    pruned = PRUNERS[spec.method].prune(given)
    saving.save_model(pruned.model, out, None if pruned.tokenizer else checkpoint)
    if pruned.tokenizer:
        pruned.tokenizer(out)
    before = {"parameters_before": pruned.parameters_before, "loss_before": pruned.loss_before, **pruned.metrics}
    blocks = given.blocks if pruned.blocks is None else pruned.blocks
    del given, pruned  # the model goes before its copy comes
    saved = opening.load_model(out)
    return {**before, "parameters": opening.parameters(saved), "loss_after": mean_loss(saved, blocks)}
