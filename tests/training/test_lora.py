"""LoRA adapters: what they start from, what they train, and what merging them back gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from featherweight.checkpoint import opening
from featherweight.errors import RecipeError
from featherweight.training import loop, lora
from featherweight.training.losses import mean_loss, token_loss
from featherweight.training.plan import TrainingPlan
from featherweight.training.spec import LoraSpec
from tests.support.families import FAMILIES, tiny_model

IDS = torch.randint(300, (4, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("targets", [None, ("q_proj", "down_proj")])
def test_merged_weights_are_w_plus_scaled_b_a_and_the_rest_is_untouched(
    tiny_checkpoint: Path, targets: tuple[str, ...] | None
) -> None:
    spec = LoraSpec(rank=3, alpha=7.5, targets=targets)
    model = opening.load_model(tiny_checkpoint)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    adapted = lora.attach(model, spec)
    loop.train_loop(model, IDS, TrainingPlan(4, 4, 1e-2))
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}
    deltas = {}
    for name, layer in layers.items():
        a, b = (part["default"].weight.detach().double() for part in (layer.lora_A, layer.lora_B))
        assert a.shape[0] == b.shape[1] == 3
        deltas[f"{name}.weight"] = 7.5 / 3 * b @ a
    merged = lora.merge(adapted)
    after = dict(merged.named_parameters())
    wanted = {name for name in before if name.endswith("proj.weight") and (not targets or name.split(".")[-2] in targets)}
    assert deltas.keys() == wanted
    assert after.keys() == before.keys()
    for name, weight in before.items():
        if name in deltas:
            assert deltas[name].abs().max() > 1e-4
            assert (after[name] - (weight.double() + deltas[name])).abs().max() < 1e-6
        else:
            assert torch.equal(after[name], weight)
    assert all(weight.requires_grad for weight in merged.parameters())


def test_fresh_adapters_change_nothing_and_train_only_themselves(tiny_checkpoint: Path) -> None:
    model = opening.load_model(tiny_checkpoint)
    expected = token_loss(model, IDS)
    lora.attach(model, LoraSpec(rank=4), seed=1)
    torch.testing.assert_close(token_loss(model, IDS), expected, rtol=0, atol=0)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert len(trained) == 2 * 2 * 7
    assert all("lora_" in name for name in trained)


def test_merging_changes_what_is_computed_by_rounding_only(tiny_checkpoint: Path) -> None:
    model = opening.load_model(tiny_checkpoint)
    adapted = lora.attach(model, LoraSpec(rank=4))
    losses = loop.train_loop(model, IDS, TrainingPlan(10, 4, 1e-2))
    beside = mean_loss(model, IDS)
    assert beside < losses[0] - 0.1
    assert mean_loss(lora.merge(adapted), IDS) == pytest.approx(beside, abs=1e-5)


def test_an_unknown_target_is_refused_with_the_known_ones(tiny_checkpoint: Path) -> None:
    model = opening.load_model(tiny_checkpoint)
    with pytest.raises(RecipeError, match=r"no linear layer 'query'; it has .*q_proj"):
        lora.attach(model, LoraSpec(targets=("q_proj", "query")))


@pytest.mark.parametrize(
    ("model_type", "target", "sharing"),
    [("llama", "lm_head", "model.embed_tokens"), ("distilbert", "vocab_projector", "distilbert.embeddings.word_embeddings")],
)
def test_a_head_that_shares_its_weight_is_refused(model_type: str, target: str, sharing: str) -> None:
    spec, untied = LoraSpec(targets=(target,)), tiny_model(model_type, tie_word_embeddings=False)
    with pytest.raises(RecipeError, match=rf"weight of '{target}' is that of '{sharing}' too.*leave '{target}' out") as refused:
        lora.attach(tiny_model(model_type, tie_word_embeddings=True), spec)
    assert "\n" not in str(refused.value)
    lora.attach(untied, spec)
    assert untied.get_submodule(target).lora_A


@pytest.mark.slow
@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.filterwarnings("error")
def test_adapters_of_every_family_raise_no_warning(model_type: str) -> None:
    lora.merge(lora.attach(tiny_model(model_type), LoraSpec(rank=2)))
