"""Rotations: the function stays, everything turns, what cannot be turned is refused in the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight.checkpoint import opening
from featherweight.checkpoint.facts import facts_of
from featherweight.errors import RecipeError
from featherweight.model.architecture import GATED_DECODERS
from featherweight.model.parent import Parent
from featherweight.progress import Progress
from featherweight.quantization.interface import QuantizationInput
from featherweight.quantization.smoothing import smoothed
from featherweight.quantization.spec import QuantizeSpec
from tasks.quantize import quantize
from tests.support.families import family_checkpoint, write_pairs

SPEC = QuantizeSpec.of(method="spinquant", grid="int4-g32", head="int8")


def untied(kind: str, folder: Path, **changes: Any) -> Path:
    return family_checkpoint(kind, folder, **{"num_key_value_heads": 2, "tie_word_embeddings": False, **changes})


def ids() -> torch.Tensor:
    return torch.randint(3, 60, (4, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@pytest.mark.parametrize("kind", GATED_DECODERS)
def test_rotations_keep_the_function_and_turn_every_weight(kind: str, tmp_path: Path) -> None:
    checkpoint = untied(kind, tmp_path / "checkpoint")
    model = opening.load_model(checkpoint).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "bias" in name:
                weight.add_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(len(name))))
        expected = model(input_ids=ids()).logits
    model.save_pretrained(checkpoint)
    found = smoothed(QuantizationInput(SPEC, checkpoint, model, ids(), checkpoint, 0, Progress()))
    with torch.no_grad():
        torch.testing.assert_close(found.model(input_ids=ids()).logits, expected, rtol=1e-4, atol=1e-4)
    still = {name for name, _ in found.tensors()} - found.smoothed.keys()
    assert all(name.endswith((".q_proj.bias", ".k_proj.bias", "q_norm.weight", "k_norm.weight")) for name in still)


def outliers(folder: Path) -> Path:
    """A checkpoint whose blocks read two channels of the residual much more than others, which every scale has to hold."""
    checkpoint = untied("llama", folder, hidden_size=64, intermediate_size=128)
    model = opening.load_model(checkpoint)
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.self_attn.q_proj, layer.self_attn.v_proj, layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight[:, [3, 17]] *= 12
    model.save_pretrained(checkpoint)
    return checkpoint


@pytest.mark.slow
def test_it_loses_less_than_rounding_where_channels_stand_out(text: Path, tmp_path: Path) -> None:
    checkpoint = outliers(tmp_path / "checkpoint")
    with torch.no_grad():
        expected = opening.load_model(checkpoint)(input_ids=ids()).logits.log_softmax(-1)
        errors = {}
        for smooth in ("none", "spinquant"):
            (out := tmp_path / smooth).mkdir()
            spec = QuantizeSpec.of(smooth=smooth, grid="int4", head=None, samples=8, sequence=16)
            quantize(spec, checkpoint=checkpoint, text=text, calibration=text, out=out)
            found = opening.load_model(out)(input_ids=ids()).logits.log_softmax(-1)
            errors[smooth] = torch.nn.functional.kl_div(found, expected, log_target=True, reduction="batchmean").item()
    assert 0 < errors["spinquant"] < 0.7 * errors["none"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("text") / "text")


def test_what_cannot_be_turned_is_refused(tmp_path: Path) -> None:
    tied, own = (untied("qwen2", tmp_path / str(tie), tie_word_embeddings=tie) for tie in (True, False))
    parents = [Parent.of(facts_of(one, opening.load_config(one))) for one in (tied, own)]
    assert SPEC.refusal(parents[1]) is None
    reason = SPEC.refusal(parents[0])
    assert reason and "the embedding of this qwen2 model is its head too" in reason
    assert QuantizeSpec.of(smooth="spinquant", method="gptq").refusal(parents[0]) == reason
    with pytest.raises(RecipeError, match="quantize: text-generation \\+ spinquant: the embedding of this qwen2"):
        quantize(SPEC, checkpoint=tied, text=tmp_path, calibration=tmp_path, out=tmp_path)
    assert "what reads the residual of a 'gemma' model" in str(SPEC.refusal(Parent("text-generation", "gemma")))
    assert "of every model known here" in str(SPEC.refusal(Parent("fill-mask")))
    assert "fills the zeros" in str(SPEC.refusal(Parent("text-generation", "llama", sparse=True)))
