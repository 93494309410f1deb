"""Grouped-query conversion: key and value heads pooled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from featherweight.checkpoint import opening
from featherweight.errors import FeatherweightError
from featherweight.model.architecture import blocks
from featherweight.pruning import attention
from featherweight.pruning.interface import sample_blocks
from featherweight.pruning.spec import PruneSpec
from tests.support.families import family_checkpoint, tiny_model
from tests.support.pruning import SMALL, logits, pruned


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [2, 1])
def test_pooled_heads_are_the_means_of_their_groups(wanted: int, text: Path, tmp_path: Path) -> None:
    source = family_checkpoint("qwen2", tmp_path / "source", num_key_value_heads=4)
    metrics = pruned(PruneSpec.of(**SMALL, method="attention", kv_heads=wanted), source, text, tmp_path / "out")
    whole, saved = (opening.load_model(folder) for folder in (source, tmp_path / "out"))
    for before, after in zip(blocks(whole), blocks(saved), strict=True):
        for name in ("k_proj", "v_proj"):
            old, new = (getattr(block.module.self_attn, name) for block in (before, after))
            for tensor, pooled in ((old.weight, new.weight), (old.bias, new.bias)):
                rows = tensor.double().unflatten(0, (4, 8))
                means = [sum(rows[head] for head in group) / len(group) for group in torch.arange(4).chunk(wanted)]
                torch.testing.assert_close(pooled, torch.cat(means).float())
        assert torch.equal(before.attentions[0].q.weight, after.attentions[0].q.weight)
    assert (metrics["kv_heads"], saved.config.num_key_value_heads, saved.config.num_attention_heads) == (wanted, wanted, 4)


def test_heads_that_are_alike_lose_nothing_when_pooled(text: Path, tmp_path: Path) -> None:
    source = family_checkpoint("llama", tmp_path / "source", num_key_value_heads=4)
    model = opening.load_model(source)
    with torch.no_grad():
        for block in blocks(model):
            for linear in (block.attentions[0].k, block.attentions[0].v):
                heads = linear.weight.view(2, 2, 8, -1)
                heads[:, 1] = heads[:, 0]
    model.save_pretrained(source)
    metrics = pruned(PruneSpec.of(**SMALL, method="attention", kv_heads=2), source, text, tmp_path / "out")
    ids = sample_blocks(PruneSpec.of(**SMALL), source, text, 0)
    torch.testing.assert_close(logits(opening.load_model(tmp_path / "out"), ids), logits(model, ids), rtol=1e-5, atol=1e-6)
    assert metrics["loss_after"] == pytest.approx(metrics["loss_before"], abs=1e-6)


@pytest.mark.parametrize(
    ("family", "kv_heads", "named"),
    [("llama", 2, "has 2 key/value heads; give one of 1$"), ("llama", None, "kv_heads None"), ("t5", 1, "no num_key_value_heads")],
)
def test_heads_that_cannot_be_pooled_are_refused(family: str, kv_heads: int | None, named: str, tmp_path: Path) -> None:
    config = tiny_model(family).config
    with pytest.raises(FeatherweightError, match=named):
        attention.target_heads(kv_heads, config)
