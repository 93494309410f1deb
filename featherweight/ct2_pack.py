"""Converting a causal language model to CTranslate2, without a second rounding.

CTranslate2's own converter lays the variables out; where the weights are quantized, the checkpoint's integers and scales go in
instead of the float matrix. CTranslate2 divides by its scales where a Grid multiplies, so they are stored as reciprocals.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.errors import StageError
from featherweight.rows import QuantizedRows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def convert(model: PreTrainedModel, checkpoint: Path, out: Path, rows: QuantizedRows | None) -> None:
    """Write `model` to the new folder `out` as a CTranslate2 model; `checkpoint` has its configuration and tokenizer.

    rows: the quantized weights, None for float32. Raises StageError where CTranslate2 does not know the architecture.
    """
    from ctranslate2.converters import TransformersConverter

    class Converter(TransformersConverter):
        def load_model(self, *_: Any, **__: Any) -> PreTrainedModel:
            return _shell(model)

        def _load(self) -> Any:
            spec = super()._load()
            give_head_dim(spec, model)
            mend_vocabulary(spec)
            if rows is not None:
                pack(spec, rows)
            return spec

    try:
        with _quick_collections():
            Converter(str(checkpoint)).convert(str(out))
    except (ValueError, NotImplementedError, AttributeError, KeyError) as error:
        kind = type(model).__name__
        raise StageError(f"CTranslate2's converter cannot take this {kind}: {' '.join(str(error).split())}") from error


@contextmanager
def _quick_collections() -> Iterator[None]:
    """CTranslate2's loaders run a full garbage collection per layer: leave out all that lives already, or it takes seconds."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _shell(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the modules around the same weights: CTranslate2's loaders take the model that they read to pieces."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def give_head_dim(spec: Any, model: PreTrainedModel) -> None:
    """Tell the decoder its head width where it is not hidden_size / heads, as after pruning heads.

    CTranslate2's Llama, Mistral and Qwen2 loaders leave it out, and the model then silently computes something else.
    """
    import numpy

    config = model.config
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None or head_dim * config.num_attention_heads == config.hidden_size:
        return
    for layer in spec.decoder.layer:
        # Specs refuse attributes that their constructor did not make.
        layer.self_attention.__dict__.setdefault("head_dim", numpy.int32(head_dim))


def mend_vocabulary(spec: Any) -> None:
    """One token per row of the embedding, and no null among the special ones: CTranslate2 refuses to load anything else."""
    size = spec.get_vocabulary_size()
    tokens = spec._vocabulary[:size]
    spec._vocabulary = tokens + [f"<extra_id_{index}>" for index in range(size - len(tokens))]
    for name in ("unk_token", "bos_token", "eos_token"):
        if getattr(spec.config, name, None) is None:
            setattr(spec.config, name, "")


def pack(spec: Any, rows: QuantizedRows) -> None:
    """Put integers and scales in place of the float matrices of a specification that `rows` knows."""
    from ctranslate2.specs.model_spec import visit_spec

    def replace(layer: Any, name: str, value: Any) -> None:
        key = name.rpartition("/")[2]
        if not hasattr(layer, f"{key}_scale") or getattr(value, "ndim", 0) != 2:
            return
        matrix = rows.find(value)
        if matrix is not None:
            setattr(layer, key, matrix.q.numpy())
            setattr(layer, f"{key}_scale", (1 / matrix.scales.squeeze(1)).numpy())

    visit_spec(spec, replace)
    rows.require_all_used("CTranslate2")
