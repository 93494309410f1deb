"""Layers cut away: which change least, and what the model without them computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight.checkpoint import opening
from featherweight.errors import RecipeError
from featherweight.model.architecture import dimensions, stacks
from featherweight.pruning import depth
from featherweight.pruning.block_influence import block_influence
from featherweight.pruning.interface import sample_blocks
from featherweight.pruning.spec import PruneSpec
from featherweight.text.model_inputs import inputs_and_labels
from tests.support.families import family_checkpoint, tiny_model
from tests.support.pruning import SMALL, logits, pruned

LAYERS: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 3},
    "qwen2": {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3},
    "t5": {"num_layers": 3, "num_decoder_layers": 3},
    "marian": {"encoder_layers": 3, "decoder_layers": 3},
    "mbart": {"encoder_layers": 3, "decoder_layers": 3},
    "bert": {"num_hidden_layers": 3},
    "distilbert": {"n_layers": 3},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", LAYERS)
def test_a_shallower_model_is_the_whole_one_with_layers_that_do_nothing(family: str, text: Path, tmp_path: Path) -> None:
    source = family_checkpoint(family, tmp_path / "source", **LAYERS[family])
    spec = PruneSpec.of(**SMALL, method="depth", layers=(1, 2))
    metrics = pruned(spec, source, text, tmp_path / "out")
    model, ids = opening.load_model(source), sample_blocks(spec, source, text, 0)
    for stack in stacks(model):
        # The first layer computes T5's position bias, so it runs, and what it makes of the hidden states is forgotten.
        stack.blocks[0].module.register_forward_hook(forget, with_kwargs=True)
    saved = opening.load_model(tmp_path / "out")
    torch.testing.assert_close(logits(saved, ids), logits(model, ids), rtol=1e-4, atol=1e-4)
    assert [size.layers for size in dimensions(saved.config)] == [2] * len(stacks(saved))
    assert metrics["layers"] == 2


def forget(module: Any, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
    given = arguments[0] if arguments else named["hidden_states"]
    return (given, *output[1:]) if isinstance(output, tuple) else given


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_influence_is_one_minus_the_cosine_of_hidden_states(family: str, text: Path, tmp_path: Path) -> None:
    source = family_checkpoint(family, tmp_path / "source", **LAYERS[family])
    model, ids = opening.load_model(source), sample_blocks(PruneSpec.of(**SMALL), source, text, 0)
    influence = block_influence(model, ids)
    inputs, labels = inputs_and_labels(model.config, ids)
    with torch.no_grad():
        shown = model(**inputs, output_hidden_states=True)
    states = (
        {"decoder": shown.hidden_states}
        if family == "llama"
        else {"encoder": shown.encoder_hidden_states, "decoder": shown.decoder_hidden_states}
    )
    real = (
        {"decoder": torch.ones_like(labels) > 0}
        if family == "llama"
        else {"encoder": inputs["attention_mask"] > 0, "decoder": labels >= 0}
    )
    for role, hidden in states.items():
        for place in range(2):  # the last state that transformers shows stands behind the last norm
            x, y = (state[real[role]].double() for state in hidden[place : place + 2])
            cosine = ((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).mean().item()
            assert influence[role][place] == pytest.approx(1 - cosine, abs=1e-5)


@pytest.mark.slow
def test_the_layer_that_changes_least_goes_and_one_stack_can_stay(text: Path, tmp_path: Path) -> None:
    source = family_checkpoint("marian", tmp_path / "source", **LAYERS["marian"])
    model = opening.load_model(source)
    idle = stacks(model)[1].blocks[1]
    with torch.no_grad():
        for output in (*(attention.o for attention in idle.attentions), idle.feed_forward.output):
            output.weight.zero_()
            output.bias.zero_()
    model.save_pretrained(source)
    metrics = pruned(PruneSpec.of(**SMALL, method="depth", layers=2, stack="decoder"), source, text, tmp_path / "out")
    saved = opening.load_model(tmp_path / "out")
    assert [len(stack.blocks) for stack in stacks(saved)] == [3, 2]
    for place, kept in enumerate((0, 2)):
        old, new = stacks(model)[1].blocks[kept], stacks(saved)[1].blocks[place]
        assert torch.equal(new.feed_forward.output.weight, old.feed_forward.output.weight)
    assert metrics["layers"] == 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"layers": 4}, "4 layers to keep of 2"),
        ({"layers": 2}, "drops none of the 2 layers"),
        ({"layers": (1, 0)}, "must be rising layer numbers between 0 and 1"),
        ({"ratio": 0.1}, "drops none of the 2 layers"),
        ({"layers": 1, "stack": "encoder"}, "a llama has no encoder"),
    ],
)
def test_layers_that_cannot_go_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        depth.wanted_layers(PruneSpec.of(method="depth", **options), tiny_model("llama").config)
