"""Padding of MLP channels: zeros that give layers of different widths the one shape that a config can say.

transformers and vLLM load models whose layers are alike. Where a layer keeps fewer channels than another, its place is taken by
channels of zeros, which add exactly nothing, take no gradient, and lie on every grid. CTranslate2 stores each layer as wide as
it is, so its export leaves them out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from featherweight.model import surgery
from featherweight.model.architecture import LAYOUTS, FeedForward, blocks
from featherweight.model.quantized_weights import QuantizedWeights
from featherweight.store.mapped import give_back

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def without_padding(model: PreTrainedModel, quantized: QuantizedWeights | None) -> tuple[PreTrainedModel, QuantizedWeights | None]:
    """A copy of `model` without the channels that are all zeros, and its quantized weights likewise; both as they are if none is.

    The copy shares the weights that are not cut. The config is the padded one: only CTranslate2's converter takes such a model.
    quantized: one scale per row, as CTranslate2 packs them.
    """
    if not any(len(kept) < feed_forward.output.in_features for feed_forward, kept in _kept(model)):
        return model, quantized
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    shell = copy.deepcopy(model, shared)
    names = {module: name for name, module in shell.named_modules()}
    for feed_forward, kept in list(_kept(shell)):
        inputs = [f"{names[linear]}.weight" for linear in feed_forward.inputs]
        quantized = quantized and _cut(quantized, inputs, f"{names[feed_forward.output]}.weight", kept)
        surgery.keep_channels(feed_forward, kept)
    return shell, quantized


def _kept(model: PreTrainedModel) -> Iterator[tuple[FeedForward, Tensor]]:
    """Every feed-forward network of a known model type, and its channels that are not padding; the first, if all are."""
    import torch

    for block in blocks(model) if model.config.model_type in LAYOUTS else ():
        weights = [block.feed_forward.output.weight.T, *(linear.weight for linear in block.feed_forward.inputs)]
        used = torch.stack([weight.detach().ne(0).any(1) for weight in weights]).any(0)
        for weight in weights:
            give_back(weight)
        if not used.any():
            used[0] = True
        yield block.feed_forward, used.nonzero().flatten()


def _cut(quantized: QuantizedWeights, inputs: list[str], output: str, kept: Tensor) -> QuantizedWeights:
    """The quantized weights with fewer rows of `inputs` and columns of `output`, where they are quantized."""
    q = {name: tensor[kept] if name in inputs else tensor for name, tensor in quantized.q.items()}
    scales = {name: tensor[kept] if name in inputs else tensor for name, tensor in quantized.scales.items()}
    if output in q:
        q[output] = q[output][:, kept]
    return replace(quantized, q=q, scales=scales)
