"""Pairs of channels: those of the library for decoders, and no pair changes what a model computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from featherweight.model.architecture import GATED_DECODERS, LAYOUTS, PRE_NORM, blocks
from featherweight.quantization.channels import Pair, inner_pairs, norm_pairs
from tests.support.families import alone_inputs, tiny_model


def logits_of(model: Any) -> torch.Tensor:
    """Predictions for one example, in float64."""
    block = torch.arange(5, 29)
    with torch.inference_mode():
        return model.double()(**alone_inputs(model, block)).logits


@torch.no_grad()
def scale(model: Any, pairs: list[Pair]) -> None:
    """Divide what each source puts out by numbers from a half to two, and multiply its readers' columns by them."""
    for place, pair in enumerate(pairs):
        source, readers = model.get_submodule(pair.source), [model.get_submodule(name) for name in pair.readers]
        factors = 2 ** (2 * torch.rand(len(source.weight), generator=torch.Generator().manual_seed(place)) - 1)
        source.weight.div_(factors.view(-1, *[1] * (source.weight.ndim - 1)))
        if getattr(source, "bias", None) is not None:
            source.bias.div_(factors)
        for reader in readers:
            reader.weight.mul_(factors)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", LAYOUTS)
@pytest.mark.parametrize("pairs", [norm_pairs, inner_pairs])
def test_scaling_every_pair_keeps_the_function(model_type: str, pairs: Any) -> None:
    model = tiny_model(model_type, vocab_size=64)
    before = logits_of(model)
    found = pairs(model)
    scale(model, found)
    assert bool(found) == (pairs is inner_pairs or model_type in PRE_NORM)
    torch.testing.assert_close(logits_of(model), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("model_type", "norm"), [("bert", "attention.output.LayerNorm"), ("marian", "self_attn_layer_norm")])
def test_a_post_norm_cannot_be_scaled(model_type: str, norm: str) -> None:
    """It feeds the residual as well as the matrices behind it."""
    model = tiny_model(model_type, vocab_size=64)
    before, (block, *_) = logits_of(model), blocks(model)
    names = {module: name for name, module in model.named_modules()}
    scale(model, [Pair(f"{block.name}.{norm}", [names[linear] for linear in block.feed_forward.inputs])])
    assert (logits_of(model) - before).abs().max() > 1e-2


@pytest.mark.parametrize(("activation", "found"), [("relu", True), ("gelu", False)])
def test_an_mlp_without_a_gate_has_a_pair_behind_a_relu_only(activation: str, found: bool) -> None:
    model = tiny_model("mbart", vocab_size=64, activation_function=activation)
    assert ("model.encoder.layers.0.fc1" in {pair.source for pair in inner_pairs(model)}) == found


@pytest.mark.slow
@pytest.mark.parametrize("model_type", GATED_DECODERS)
def test_pairs_of_decoders_are_the_librarys(model_type: str) -> None:
    from compressed_tensors.utils import match_modules_set
    from llmcompressor.modifiers.transform.awq.dynamic_mappings import get_layer_mappings_from_model as awq_mappings
    from llmcompressor.modifiers.transform.smoothquant.dynamic_mappings import get_layer_mappings_from_model as smooth_mappings

    model = tiny_model(model_type, vocab_size=64, num_key_value_heads=4)
    names = {module: name for name, module in model.named_modules()}

    def resolved(mappings: list[tuple[str, list[str]]]) -> set[tuple[str, ...]]:
        sets = (found for source, readers in mappings for found in match_modules_set(model, (source, *readers)))
        return {tuple(names[module] for (module,) in found) for found in sets}

    def ours(pairs: list[Pair]) -> set[tuple[str, ...]]:
        return {(pair.source, *pair.readers) for pair in pairs}

    norms, inner = ours(norm_pairs(model)), ours(inner_pairs(model))
    assert resolved([(one.smooth_layer, one.balance_layers) for one in awq_mappings(model)]) == norms | inner
    assert resolved([(one.smooth_layers, one.balance_layers) for one in smooth_mappings(model)]) == norms
