"""Rotary embeddings as CTranslate2 computes them, from those of the PyTorch model.

CTranslate2's loaders read names of transformers 4, and so take the usual base for every model; of scaled embeddings it knows three
kinds, llama3's for one original length alone. But "su" divides each frequency by a factor of its own, so that every kind whose
frequencies do not depend on the text's length is one of those: linear, llama3, yarn, and longrope up to its original length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

SAME = 1e-6
"""Relative difference of frequencies that are the same, computed in another order."""
ROOMY = 2**30
"""A context that is never left: su scales attention, and changes its factors, beyond the original one."""


def hide_scaling(config: Any) -> None:
    """Have a loader see plain embeddings of the configuration's own base, whatever their kind: `give` puts the rest in."""
    told = getattr(config, "rope_parameters", None)
    if not told:
        return
    plain = next((one for one in told.values() if isinstance(one, dict)), told)
    config.rope_theta = plain.get("rope_theta", 10000.0)
    config.rope_parameters = None


def give(spec: Any, model: PreTrainedModel) -> None:
    """Give each layer of a decoder's specification the base, frequencies and scale of attention of the model's own layer."""
    from ctranslate2.specs.attention_spec import RotaryScalingType
    from numpy import float32, int8, int32

    for layer, rotary, scale in _layers(model):
        attention, (frequencies, base) = spec.decoder.layer[layer].self_attention, rotary
        told = vars(attention)  # specifications refuse attributes that their constructor did not make
        if "rotary_dim" not in told:
            continue
        told["rotary_base"] = float32(base)
        told["rotary_dim"] = int32(2 * len(frequencies))
        if scale is not None:
            told["queries_scale"] = float32(scale)
        factors = _plain(base, len(frequencies)) / frequencies
        if (factors - 1).abs().max() > SAME:
            told["rotary_scaling_type"] = int8(RotaryScalingType.Su)
            told["rotary_scaling_long_factor"] = told["rotary_scaling_short_factor"] = factors.float().contiguous()
            told["original_max_position_embeddings"] = told["max_position_embeddings"] = int32(ROOMY)


def _plain(base: float, count: int) -> Tensor:
    """The frequencies of plain embeddings: float64 [count]."""
    import torch

    return base ** -(torch.arange(count, dtype=torch.float64) / count)


def _layers(model: Any) -> Iterator[tuple[int, tuple[Tensor, float], float | None]]:
    """(layer, (its frequencies, their base), its scale of attention where that is not the usual one) of a decoder with a rotary
    module for all its layers; nothing of any other.
    """
    rotary = getattr(model.base_model, "rotary_emb", None)
    if rotary is None:
        return
    kinds = getattr(model.config, "layer_types", None) or []
    for index, block in enumerate(getattr(model.base_model, "layers", None) or model.base_model.h):
        kind = f"{kinds[index]}_" if kinds and hasattr(rotary, f"{kinds[index]}_inv_freq") else ""
        told = model.config.rope_parameters
        base = float((told[kinds[index]] if kind else told)["rope_theta"])
        magnitude = float(getattr(rotary, f"{kind}attention_scaling", 1.0))
        now = getattr(rotary, f"{kind}inv_freq")  # which a long text may have changed, as longrope's
        frequencies = getattr(rotary, f"{kind}original_inv_freq", now).double().cpu()
        yield index, (frequencies, base), _scale(block, magnitude)


def _scale(block: nn.Module, magnitude: float) -> float | None:
    """What a layer multiplies its queries with, where the magnitude of the embeddings is the queries' and the keys'."""
    attention: Any = next((part for name, part in block.named_children() if name in ("self_attn", "attention")), None)
    scale, width = getattr(attention, "scaling", None), getattr(attention, "head_dim", None)
    if scale is None or width is None:
        return None
    scale *= magnitude**2
    return None if abs(scale * width**0.5 - 1) < SAME else float(scale)
