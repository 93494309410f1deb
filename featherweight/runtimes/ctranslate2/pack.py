"""Converting a decoder, an encoder-decoder or an encoder's blocks to CTranslate2, without a second rounding.

CTranslate2's own converter lays the variables out; where the weights are quantized, the checkpoint's integers and scales go in
instead of the float matrix. CTranslate2 divides by its scales where a Grid multiplies, so they are stored as reciprocals.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.errors import StageError
from featherweight.model.architecture import task_of
from featherweight.runtimes.ctranslate2 import loaders, patches, rotary, variables
from featherweight.runtimes.packing import QuantizedRows
from featherweight.spec import HEADED
from featherweight.system import device
from featherweight.system.device import CPU

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def convert(model: PreTrainedModel, checkpoint: Path, out: Path, rows: QuantizedRows | None, floats: str | None = None) -> None:
    """Write `model` to the new folder `out` as a CTranslate2 model; `checkpoint` has its configuration and tokenizer.

    Matrix by matrix: beside the model no more than one is held as it is written (see variables.py), and those that are fused.
    rows: the quantized weights, None for float ones. floats: what those are stored as, None for float32.
    Raises StageError where CTranslate2 does not know the architecture.
    """
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):
        def load_model(self, *_: Any, **__: Any) -> PreTrainedModel:
            shell: Any = _shell(model)
            if task_of(model.config) in HEADED:
                shell = shell.base_model
            patches.mend_model(shell)
            return shell

        def _load(self) -> Any:
            spec = super()._load()
            patches.drop_pooler(spec)
            patches.give_head_dim(spec, model)
            patches.give_decoder_heads(spec, model)
            patches.give_epsilon(spec, model)
            rotary.give(spec, model)
            patches.mend_vocabularies(spec, model)
            if rows is not None:
                pack(spec, rows)
            variables.defer(spec)
            return spec

    try:
        with patches.quick_collections(), loaders.ours():
            Converter(str(checkpoint)).convert(str(out), quantization=floats)
    except (ValueError, NotImplementedError, AttributeError, KeyError) as error:
        kind = type(model).__name__
        raise StageError(f"CTranslate2's converter cannot take this {kind}: {' '.join(str(error).split())}") from error


def _shell(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules around the same weights: CTranslate2's loaders take the model that they read to pieces.

    In main memory, where the weights of a model on a GPU are copied to: the converter reads their addresses, and crashes at others.
    """
    if model.config.model_type == "gptj":  # whose loader permutes queries and keys where they lie
        return device.on_cpu(copy.deepcopy(model))
    shared: dict[int, Any] = {id(tensor): _in_memory(tensor) for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def _in_memory(tensor: Tensor) -> Tensor:
    from torch import nn

    if tensor.device.type == CPU:
        return tensor
    moved = tensor.detach().cpu()
    return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved


def pack(spec: Any, rows: QuantizedRows) -> None:
    """Put integers and scales in place of the float matrices of a specification that `rows` knows."""
    from ctranslate2.specs.model_spec import visit_spec

    def replace(layer: Any, name: str, value: Any) -> None:
        key = name.rpartition("/")[2]
        if not hasattr(layer, f"{key}_scale") or getattr(value, "ndim", 0) != 2:
            return
        matrix = rows.find(value)
        if matrix is not None:
            setattr(layer, key, variables.integers(matrix))
            setattr(layer, f"{key}_scale", (1 / matrix.read()[1].squeeze(1)).numpy())

    visit_spec(spec, replace)
    rows.require_all_used("CTranslate2")
