"""Reading on, token by token, is reading all anew: with keys and values, with states, and with nothing kept."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

from featherweight.model.architecture import auto_names, family_of, task_of
from featherweight.model.decoding import (
    CACHES,
    WITHOUT_KEYS_AND_VALUES,
    Reading,
    cache_name,
    decoder_refusal,
    language_refusal,
    random_refusal,
    windows_refusal,
)

SMALL = {"vocab_size": 99, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
MAMBA = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4}
KINDS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "llama": ("past_key_values", {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}),
    "mamba": ("cache_params", MAMBA),
    "falcon_mamba": ("cache_params", MAMBA),
    "mamba2": ("cache_params", {
        "chunk_size": 8,
        "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 2}),
    "bamba": ("past_key_values", {  # whose own forward counts positions anew at each step
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "attn_layer_indices": [1], "num_attention_heads": 4,
        "num_key_value_heads": 2, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}),
    "openai-gpt": (None, {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "told", "right"),
    [
        ("reformer", {"hash_seed": None}, {"hash_seed": 1}),
        ("reformer", {"attn_layers": ["local", "lsh"]}, {"attn_layers": ["local", "local"]}),
        ("yoso", {"use_expectation": False}, {}),
    ],
)
def test_attention_that_is_drawn_anew_is_refused(kind: str, told: dict[str, Any], right: dict[str, Any]) -> None:
    assert "hashes anew each time" in str(random_refusal(AutoConfig.for_model(kind, **told)))
    assert random_refusal(AutoConfig.for_model(kind, **right)) is None


@pytest.mark.parametrize("kind", KINDS)
def test_reading_on_is_reading_all_anew(kind: str) -> None:
    name, sizes = KINDS[kind]
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **sizes)).eval()
    texts, reading = torch.randint(1, 99, (2, 20)), Reading(model)
    assert cache_name(model) == name
    with torch.inference_mode():
        whole = model(texts).logits
        steps = [reading.next(texts[:, :9]), *(reading.next(texts[:, place : place + 1]) for place in range(9, 20))]
    torch.testing.assert_close(torch.stack(steps, dim=1), whole[:, 8:], atol=1e-5, rtol=1e-4)


def test_the_model_types_without_keys_and_values_are_those() -> None:
    for kind in ("llama", "gpt2", "falcon_h1", "jamba", "lfm2", *WITHOUT_KEYS_AND_VALUES):
        name = cache_name(MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[kind]])
        assert (name == CACHES[0]) == (kind not in WITHOUT_KEYS_AND_VALUES), kind


@pytest.mark.parametrize(
    ("kind", "architecture", "told", "reason"),
    [
        ("bert", "BertLMHeadModel", {}, "is_decoder: false.* a bert model reads the texts that follow; set it to true"),
        ("bert", "BertLMHeadModel", {"is_decoder": True}, None),
        ("roberta", "RobertaForCausalLM", {}, "is_decoder: false"),
        ("bert-generation", "BertGenerationDecoder", {"architectures": ["BertGenerationForCausalLM"]}, "is_decoder: false"),
        ("bert", "BertForMaskedLM", {}, None),
        ("bart", "BartForCausalLM", {"is_encoder_decoder": False}, None),
        ("xlnet", "XLNetLMHeadModel", {}, "xlnet model reads the texts that follow"),
        ("xlm", "XLMWithLMHeadModel", {}, None),
        ("xlm", "XLMWithLMHeadModel", {"causal": True}, None),
        ("rwkv", "RwkvForCausalLM", {}, "takes one text at a time"),
        ("recurrent_gemma", "RecurrentGemmaForCausalLM", {}, "hands none of it over"),
        ("prophetnet", "ProphetNetForConditionalGeneration", {}, "writes no text"),
        ("perceiver", "PerceiverForMaskedLM", {}, "at as many places as it was made for"),
        ("gpt2", "GPT2LMHeadModel", {}, None),
    ],
)
def test_only_decoders_that_read_from_left_to_right_are_taken(
    kind: str, architecture: str, told: dict[str, Any], reason: str | None
) -> None:
    found = decoder_refusal(AutoConfig.for_model(kind, **{"architectures": [architecture], **told}))
    assert (found is None) == (reason is None)
    assert reason is None or re.search(reason, str(found))


def test_a_model_of_many_languages_has_to_say_which_it_reads() -> None:
    silent, told = (
        AutoConfig.for_model("xmod", languages=["en_XX", "de_DE"], **told) for told in ({}, {"default_language": "de_DE"})
    )
    assert "names no default_language" in str(language_refusal(silent)) and "en_XX, de_DE" in str(language_refusal(silent))
    assert language_refusal(told) is language_refusal(AutoConfig.for_model("bert")) is None


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"use_sliding_window": False, "sliding_window": 32}, "layers of sliding_attention and no sliding_window"),
        ({"use_sliding_window": True, "sliding_window": 32}, None),
    ],
)
def test_layers_with_a_window_need_its_width(told: dict[str, Any], reason: str | None) -> None:
    kinds = ["full_attention", "sliding_attention"]
    found = windows_refusal(AutoConfig.for_model("qwen2", num_hidden_layers=2, layer_types=kinds, **told))
    assert (found is None) == (reason is None)
    assert reason is None or reason in str(found)


@pytest.mark.parametrize("kind", ["flaubert", "xlm"])
def test_a_class_that_stands_for_both_ways_of_reading_is_what_its_configuration_says(kind: str) -> None:
    config = AutoConfig.for_model(kind, architectures=[auto_names().MODEL_FOR_MASKED_LM_MAPPING_NAMES[kind]])
    assert (family_of(config), task_of(config)) == ("encoder", "fill-mask")
    config.causal = True
    assert (family_of(config), task_of(config)) == ("causal", "text-generation")
