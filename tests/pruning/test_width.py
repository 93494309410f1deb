"""Hidden width: the saved model is the whole one with silent channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight.checkpoint import opening
from featherweight.errors import RecipeError, StageError
from featherweight.model.architecture import dimensions
from featherweight.progress import Progress
from featherweight.pruning import width
from featherweight.pruning.importance import importance, keep_best
from featherweight.pruning.interface import sample_blocks
from featherweight.pruning.spec import PruneSpec
from tests.support.families import family_checkpoint
from tests.support.pruning import SMALL, logits, pruned


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "t5", "qwen3"])
@pytest.mark.parametrize("criterion", ["param_first", "activation"])
def test_a_narrower_model_is_the_whole_one_with_silent_channels(family: str, criterion: str, text: Path, tmp_path: Path) -> None:
    spec = PruneSpec.of(**SMALL, method="width", hidden=24, criterion=criterion)
    source = family_checkpoint(family, tmp_path / "source", **({"tie_word_embeddings": True} if family == "llama" else {}))
    metrics = pruned(spec, source, text, tmp_path / "out")
    model, ids = opening.load_model(source), sample_blocks(spec, source, text, 0)
    if criterion == "activation":
        score = width.activations(model, ids)
    else:
        score = importance(model, [width.residual_group(model)], criterion, ids, 0, Progress())[0][0]
    silence_width(model, keep_best(score, 24))
    saved = opening.load_model(tmp_path / "out")
    torch.testing.assert_close(logits(saved, ids), logits(model, ids), rtol=1e-3, atol=1e-3)
    assert (metrics["hidden_size"], saved.config.hidden_size, dimensions(saved.config)[0].heads) == (24, 24, 4)
    assert dimensions(saved.config)[0].head_dim == 8


def silence_width(model: Any, kept: torch.Tensor) -> None:
    """Zeros in every channel that is not kept, and norms that count the kept ones only."""
    lost = [channel for channel in range(32) if channel not in kept.tolist()]
    with torch.no_grad():
        for module, dim in width.members(model):
            module.weight.transpose(0, dim)[lost] = 0
        for norm in width.norms(model):
            norm.weight[lost] = 0
            norm.weight.mul_((24 / 32) ** 0.5)
            norm.variance_epsilon *= 24 / 32


def test_activations_are_minitrons_sums_over_the_norms(text: Path, tmp_path: Path) -> None:
    source = family_checkpoint("llama", tmp_path / "source")
    model, ids = opening.load_model(source), sample_blocks(PruneSpec.of(**SMALL), source, text, 0)
    seen: dict[Any, list[torch.Tensor]] = {}
    layers = [norm for layer in model.model.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    for norm in [*layers, model.model.norm]:
        norm.register_forward_hook(lambda module, _, output: seen.setdefault(module, []).append(output[0].double()))
    for block in ids:
        logits(model, block[None])
    expected = sum(torch.stack([one.abs().mean(0) for one in outputs]).norm(dim=0) for outputs in seen.values())
    assert len(seen) == 5
    torch.testing.assert_close(width.activations(model, ids), expected.float())


def test_a_hidden_size_that_follows_from_the_heads_is_refused(text: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="hidden size of a bert is its heads times their width"):
        pruned(PruneSpec.of(method="width"), family_checkpoint("bert", tmp_path / "bert"), text, tmp_path / "a")
    with pytest.raises(RecipeError, match=r"prune\.hidden 32 removes nothing"):
        pruned(
            PruneSpec.of(method="width", hidden=32, **SMALL), family_checkpoint("llama", tmp_path / "llama"), text, tmp_path / "b"
        )
