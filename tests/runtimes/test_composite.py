"""A decoder inside a model of text and images, whose sizes stand in a part of its configuration: served as any other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from featherweight.recipe.facts import Facts
from featherweight.recipe.recipe import Recipe
from featherweight.runtimes.bytes_read import bytes_read
from featherweight.runtimes.interface import Limits
from featherweight.runtimes.torch.eager import TorchModel
from featherweight.store.served_folder import Serving
from tests.support.families import word_tokenizer

TEXT: dict[str, Any] = {
    **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16, "max_position_embeddings": 64},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
IMAGES: dict[str, Any] = {
    **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
    **{"image_size": 16, "patch_size": 8},
}


@pytest.fixture
def served(tmp_path: Path) -> Path:
    import torch
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    config = Gemma3Config(text_config=TEXT, vision_config=IMAGES, mm_tokens_per_image=4, image_token_index=63)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "made")
    shutil.copytree(tmp_path / "made", tmp_path / "served")
    Serving("torch").write(tmp_path / "served")
    return tmp_path / "served"


def test_texts_are_scored_and_written_as_transformers_does(served: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = TorchModel(served, Serving.read(served), Limits(threads=1, max_tokens=48, max_batch=2))
    ids = [5, 9, 11, 7, 20, 33, 41, 8]
    reference = AutoModelForCausalLM.from_pretrained(served).eval()
    with torch.no_grad():
        said = reference(torch.tensor([ids])).logits.log_softmax(-1)[0]
        text = reference.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=None)[0, len(ids) :]
    expected = [float(said[place, after]) for place, after in enumerate(ids[1:])]
    assert model.logprobs([ids])[0] == pytest.approx(expected, abs=1e-5)
    assert model.generate([ids], 8).tokens == [text.tolist()]


def test_what_a_position_of_its_cache_takes_is_known(served: Path) -> None:
    found = bytes_read(served)
    assert found is not None and found.position == 2 * 2 * 2 * 8 * 4  # keys and values of two layers, two heads of eight channels


def test_the_plan_says_what_its_variants_are_not_given(served: Path) -> None:
    word_tokenizer("llama").save_pretrained(served)
    wanted = Recipe.model_validate(
        {
            "name": "try",
            "checkpoint": {"source": str(served)},
            "data": {"source": "text"},
            "variants": [{"serve": "eager"}],
            "stages": {"export": {"eager": {"engine": "torch"}}},
            "promote": {"model": "try"},
        }
    )
    assert Facts.read(wanted).notes == (f"{served}: its text alone is optimized, measured and served, without images",)
