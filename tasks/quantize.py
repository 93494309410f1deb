"""quantize: move a checkpoint's weights to a grid, by one of the methods of featherweight/quantization."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint import opening
from featherweight.checkpoint.facts import ALREADY_QUANTIZED, facts_of
from featherweight.checkpoint.files import CONFIG, INDEX, copy
from featherweight.checkpoint.saving import copy_companions
from featherweight.checkpoint.streamed import is_streamed, open_model
from featherweight.errors import CheckpointError, RecipeError, StageError
from featherweight.grid import Grid, grid_named, row_chunks
from featherweight.model.architecture import LAYOUTS
from featherweight.model.matrices import in_float
from featherweight.model.parent import Parent
from featherweight.model.quantized_weights import DESCRIPTION, QuantizedWeights
from featherweight.model.sparsity import FILE as SPARSITY
from featherweight.model.sparsity import Sparsity, Zeros
from featherweight.progress import Metrics, Progress
from featherweight.quantization.catalog import DEFAULT, QUANTIZERS
from featherweight.quantization.interface import Choice, QuantizationInput
from featherweight.quantization.judgement import Answers, judged
from featherweight.quantization.sensitivity import Sensitivity
from featherweight.quantization.smoothing import smoothed, smoother
from featherweight.quantization.spec import QuantizeSpec
from featherweight.store.mapped import give_back
from featherweight.store.tensor_file import Kind, write_tensors
from featherweight.text.model_inputs import example_blocks
from featherweight.training.data_parallel import launched, leads
from featherweight.training.launch import run_in_processes
from featherweight.training.losses import block_answers, mean_loss
from tasks.stage import stage

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

COMPARED = 16
"""Calibration blocks on which the checkpoint and its quantized copy are compared."""
MUCH = 0.1
"""The share of weights in float that is worth a note."""


@stage("quantize", version="2", libraries=("torch", "transformers"))
def quantize(
    spec: QuantizeSpec,
    *,
    checkpoint: Path,
    text: Path,
    calibration: Path,
    out: Path,
    sensitivity: Path | None = None,
    scratch: Path | None = None,
    seed: int = 0,
    progress: Progress = Progress(),
) -> Metrics:
    """Quantize the Linear weights of all blocks to `spec.grid`, embedding and head to `spec.head`; smooth before if asked to.

    sensitivity: the scan of this checkpoint that `spec.mixed` asks for; it says which matrices take the finer grid.
    scratch: where a killed training (QAT) resumes from.

    Writes a checkpoint of the quantized float weights that loads plainly, with the integers and scales beside it (see
    model/quantized_weights.py). Metrics: `loss_before`, `loss_after` and, of plain rounding to nearest on the same grids,
    `rtn_loss` (cross-entropy on the same windows of the calibration text, nats per token), `weight_rms_error` (of the quantized
    weights, as a share of their RMS), `bits_per_weight` (over all weights, scales included), `float_weights` (the share of
    weights on no grid), for mixed precision `finer_matrices` and `predicted_quality_loss`, for a sparse checkpoint `zero_share`,
    and the method's own.
    Raises RecipeError for a budget out of reach or a method that would fill a sparse checkpoint's zeros, DataError for too
    little text, StageError where a method fails, or makes what is worse than rounding to nearest (quantization/judgement.py).
    """
    if spec.together > 1 and not launched():
        folders = {"checkpoint": checkpoint, "text": text, "calibration": calibration, "sensitivity": sensitivity}
        folders |= {"scratch": scratch, "out": out}
        return run_in_processes(f"{__name__}:quantize", spec, folders, seed, spec.together, progress)
    _check(spec, checkpoint)
    finer, mixing = _mix(spec, sensitivity)
    model = _opened(spec, checkpoint, out)
    zeros = Zeros.of(model, Sparsity.read(checkpoint))
    blocks = example_blocks(checkpoint, model.config, calibration, spec.sequence, limit=spec.samples, seed=seed)
    room = out if is_streamed(model) else None
    given = QuantizationInput(spec, checkpoint, model, blocks, text, seed, progress, finer=finer, scratch=scratch, room=room)
    before = _answers_before(given)
    given = smoothed(given)
    choice = _with_heads(given, QUANTIZERS[spec.method].choose(given))
    if not leads():
        return {}
    error = write_checkpoint(given, choice, out)
    saved = open_model(out)
    zeros.require_kept(saved, spec.method)
    return {
        "loss_before": _mean(before),
        "weight_rms_error": error,
        **_share_in_float(saved, choice.quantized, progress),
        **mixing,
        **zeros.metrics(),
        **choice.metrics,
        **judged(given, saved, choice.quantized.grids, blocks[:COMPARED], before),
    }


def _opened(spec: QuantizeSpec, checkpoint: Path, out: Path) -> PreTrainedModel:
    """The model, in its files where it is large and the methods can leave it there: what calibrates, where the blocks are known.

    What is smoothed has room in `out`.
    """
    known = spec.methods == (DEFAULT,) or opening.model_type(checkpoint) in LAYOUTS
    streams = known and all(QUANTIZERS[name].streams for name in spec.methods)
    return open_model(checkpoint, room=out if smoother(spec) else None) if streams else opening.load_model(checkpoint)


def _with_heads(given: QuantizationInput[Any], choice: Choice) -> Choice:
    """Which of the weights are embedding and head is asked of the model, so that no method has to say it."""
    quantized = choice.quantized
    return replace(choice, quantized=replace(quantized, heads=given.heads & quantized.q.keys()))


def _share_in_float(model: PreTrainedModel, quantized: QuantizedWeights, progress: Progress) -> Metrics:
    """`bits_per_weight` over all weights of `model`, and the share that lies on no grid; a note where that is much."""
    rest = in_float(model, quantized)
    count = sum(rest.values())
    share = count / opening.parameters(model)
    if share > MUCH:
        most = ", ".join(f"{name} ({numel:,})" for name, numel in list(rest.items())[:3])
        progress.note(f"{share:.0%} of the weights stay in float, most of them {most}")
    return {"bits_per_weight": quantized.bits_per_weight(count), "float_weights": share}


def _mix(spec: QuantizeSpec, scanned: Path | None) -> tuple[dict[str, Grid], Metrics]:
    """The grids of the matrices that mixed precision keeps finer, and what the scan predicts of that."""
    if spec.mixed is None:
        return {}, {}
    if scanned is None:
        raise RecipeError("quantize.mixed needs the sensitivity scan of the checkpoint; run the sensitivity stage first")
    scan = Sensitivity.read(scanned)
    names = scan.finer_for(spec.mixed.budget) if spec.mixed.bits is None else scan.finer_within(spec.mixed.bits)
    metrics = {"finer_matrices": len(names), "predicted_quality_loss": scan.predicted_loss(names)}
    return dict.fromkeys(names, grid_named(spec.mixed.grid)), metrics


def _check(spec: QuantizeSpec, checkpoint: Path) -> None:
    """Refuse what cannot work before any weight is read."""
    config = opening.load_config(checkpoint)
    opening.require_context(config, spec.sequence, "quantize")
    if (checkpoint / DESCRIPTION).exists():
        raise CheckpointError(ALREADY_QUANTIZED)
    parent = replace(Parent.of(facts_of(checkpoint, config)), sparse=Sparsity.read(checkpoint) is not None)
    if reason := spec.refusal(parent):
        raise RecipeError(f"quantize: {reason}")
    if getattr(config, "quantization_config", None):
        raise CheckpointError(f"{checkpoint} is quantized already (quantization_config in its config.json); give the float one")


def _answers_before(given: QuantizationInput[Any]) -> Answers:
    """The checkpoint's on the calibration text. Where its loss is not finite, an error that says where the numbers go wrong."""
    found = block_answers(given.model, given.calibration[:COMPARED])
    loss = _mean(found)
    if math.isfinite(loss):
        return found
    for name, tensor in given.tensors():
        _require_finite(name, tensor)
    raise StageError(
        f"the checkpoint's loss on the calibration text is {loss}: {_first_not_finite(given)} gives NaN or infinite activations "
        "though all weights are finite; check the checkpoint's config and the text"
    )


def _mean(answers: Answers) -> float:
    """The loss, in nats for each predicted token."""
    return (answers[0].sum() / answers[1].sum()).item()


def _first_not_finite(given: QuantizationInput[Any]) -> str:
    """Name of the first module whose output holds NaN or infinity on the calibration text."""
    import torch

    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: object, arguments: object, output: object) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if isinstance(tensor, torch.Tensor) and not torch.isfinite(tensor).all():
                found.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in given.model.named_modules()]
    mean_loss(given.model, given.calibration[:COMPARED])
    for handle in handles:
        handle.remove()
    return found[0] if found else "the loss"


def _require_finite(name: str, tensor: Tensor) -> None:
    if not tensor.isfinite().all():
        raise CheckpointError(f"{name} holds NaN or infinite weights; take an earlier checkpoint")


def write_checkpoint(given: QuantizationInput[Any], choice: Choice, out: Path) -> float:
    """Write the quantized checkpoint, tensor by tensor; returns the relative RMS error of the quantized weights."""
    squares = [0.0, 0.0]
    shards: dict[str, str] = {}
    kinds = _kinds(given)
    for file, members in groupby(given.files(), key=lambda member: member[0]):
        finals = ((name, _final(given.read_as(name), tensor, choice, given.transposed, squares)) for _, name, tensor in members)
        write_tensors(out / file, kinds[file], finals)
        shards |= dict.fromkeys(kinds[file], file)
    if given.weights.index is not None:
        size = sum(dtype.itemsize * math.prod(shape) for file in kinds.values() for dtype, shape in file.values())
        index = {"metadata": {"total_size": size}, "weight_map": shards}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    choice.quantized.write(out)
    _write_companions(given, out)
    return (squares[0] / squares[1]) ** 0.5 if squares[1] else 0.0


def _kinds(given: QuantizationInput[Any]) -> dict[str, dict[str, Kind]]:
    """What is written to each file: every tensor in float32."""
    import torch

    found: dict[str, dict[str, Kind]] = {}
    for file, name, tensor in given.files():
        found.setdefault(file, {})[name] = (torch.float32, tuple(tensor.shape))
    return found


def _final(name: str, tensor: Tensor, choice: Choice, transposed: frozenset[str], squares: list[float]) -> Tensor:
    """The float32 tensor to save; adds a quantized weight's squared error and squares to `squares`."""
    source = choice.changed.get(name, tensor)
    if name not in choice.quantized.q:
        _require_finite(name, source)
        return source.float()
    weight = choice.quantized.dequantize(name)
    weight = weight.T if name in transposed else weight
    for rows in row_chunks(*weight.shape):
        part = source[rows].float()
        _require_finite(name, part)
        if not weight[rows].isfinite().all():
            raise StageError(f"{choice.quantized.method} made NaN or infinite weights of {name}; do not use it, take rtn")
        squares[0] += (weight[rows] - part).double().square().sum().item()
        squares[1] += part.double().square().sum().item()
    give_back(source)
    return weight


def _write_companions(given: QuantizationInput[Any], out: Path) -> None:
    """config.json, with the type that the weights now have, and the tokenizer's files."""
    config = json.loads((given.checkpoint / CONFIG).read_text())
    config.pop("torch_dtype", None)
    (out / CONFIG).write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n")
    if Sparsity.read(given.checkpoint):
        copy(given.checkpoint / SPARSITY, out / SPARSITY)
    copy_companions(given.checkpoint, out)
