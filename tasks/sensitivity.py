"""sensitivity: round each matrix of a checkpoint alone, and see how far the model's predictions move."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint import opening
from featherweight.errors import RecipeError, StageError
from featherweight.grid import Grid, grid_named
from featherweight.model.architecture import task_of
from featherweight.model.parent import Parent, linear_refusal
from featherweight.progress import Metrics, Progress
from featherweight.quantization.interface import QuantizationInput, start_scales
from featherweight.quantization.sensitivity import Matrix, Sensitivity
from featherweight.quantization.spec import QuantizeSpec, SensitivitySpec
from featherweight.text.model_inputs import IGNORED, example_blocks, inputs_and_labels
from tasks.stage import stage

if TYPE_CHECKING:
    from torch import Tensor, nn

BATCH = 4


@stage("sensitivity", version="1", libraries=("torch", "transformers"))
def sensitivity(
    spec: SensitivitySpec, *, checkpoint: Path, calibration: Path, out: Path, seed: int = 0, progress: Progress = Progress()
) -> Metrics:
    """Scan `checkpoint`: KL(float || one matrix rounded) per predicted token, for each matrix that quantize would round.

    The finer grid's divergence follows from the coarser one's: for small errors KL is quadratic in them, so it shrinks as the
    squared rounding error does. Writes sensitivity.json and sensitivity.html. Metrics: `matrices`, `loss` (nats per token),
    `predicted_quality_loss` (all matrices on the coarse grid). Raises StageError where the model computes what is no number.
    """
    config = opening.load_config(checkpoint)
    if reason := linear_refusal("sensitivity", Parent(task_of(config), config.model_type)):
        raise RecipeError(reason)
    model = opening.load_model(checkpoint).eval()
    blocks = example_blocks(checkpoint, model.config, calibration, spec.sequence, limit=spec.samples, seed=seed)
    rounding = QuantizeSpec.of(grid=spec.grid, head=spec.head, scale=spec.scale)
    given = QuantizationInput(rounding, checkpoint, model, blocks, calibration, seed, progress)
    grids = given.grids
    loss, divergences = scan(model, grids, blocks, spec.scale, progress)
    finer = grid_named(spec.finer)
    weights = dict(model.named_parameters(remove_duplicate=False))
    matrices = tuple(_matrix(name, weights[name], grids[name], finer, spec.scale, divergences[name]) for name in grids)
    result = Sensitivity(spec.grid, spec.finer, loss, matrices)
    result.write(out)
    return {"matrices": len(matrices), "loss": loss, "predicted_quality_loss": result.predicted_loss(frozenset())}


def scan(model: Any, grids: dict[str, Grid], blocks: Tensor, scale: str, progress: Progress) -> tuple[float, dict[str, float]]:
    """(the float model's loss, by name the KL of its predictions from those with that matrix alone rounded), nats per token.

    The model is left as it was. A batch is scored once in float and once for each matrix: no second model is held.
    """
    import torch

    weights = dict(model.named_parameters(remove_duplicate=False))
    totals, loss, tokens = dict.fromkeys(grids, 0.0), 0.0, 0
    parts = blocks.split(BATCH)
    with torch.inference_mode():
        for place, part in enumerate(parts):
            inputs, labels = inputs_and_labels(model.config, part.to(model.device))
            known = labels != IGNORED
            float_logs = _log_probabilities(model, inputs, known)
            loss -= float_logs.gather(-1, labels[known][:, None]).double().sum().item()
            tokens += int(known.sum())
            for done, (name, grid) in enumerate(grids.items(), 1):
                totals[name] += _divergence(model, weights[name], grid, scale, inputs, known, float_logs)
                progress.step(place * len(grids) + done, len(parts) * len(grids))
    broken = [name for name, total in totals.items() if not math.isfinite(total)]
    if broken or not math.isfinite(loss):
        raise StageError(f"sensitivity: {broken[0] if broken else 'the checkpoint'} gives predictions that are no numbers")
    return loss / tokens, {name: total / tokens for name, total in totals.items()}


def _divergence(
    model: Any, weight: nn.Parameter, grid: Grid, scale: str, inputs: dict[str, Any], known: Tensor, float_logs: Tensor
) -> float:
    """Summed KL(float || rounded) of the known positions with `weight` rounded, which is put back."""
    kept = weight.data
    weight.data = grid.dequantize(*grid.quantize(kept, start_scales(grid, kept, scale)))
    try:
        rounded = _log_probabilities(model, inputs, known)
    finally:
        weight.data = kept
    return (float_logs.exp() * (float_logs - rounded)).double().sum().item()


def _log_probabilities(model: Any, inputs: dict[str, Any], known: Tensor) -> Tensor:
    """float32 [known positions, vocabulary]."""
    return model(**inputs).logits[known].float().log_softmax(-1)


def _matrix(name: str, weight: Tensor, grid: Grid, finer: Grid, scale: str, divergence: float) -> Matrix:
    coarse_error, fine_error = (_squared_error(weight.detach(), one, scale) for one in (grid, finer))
    share = fine_error / coarse_error if coarse_error else 0.0
    columns = weight.shape[1]
    bits, finer_bits = grid.bits_per_weight(columns), finer.bits_per_weight(columns)
    return Matrix(name, weight.numel(), bits, finer_bits, divergence, divergence * share)


def _squared_error(weight: Tensor, grid: Grid, scale: str) -> float:
    rounded = grid.dequantize(*grid.quantize(weight, start_scales(grid, weight, scale)))
    return (rounded - weight).double().square().sum().item()
