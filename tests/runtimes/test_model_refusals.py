"""What engines refuse of a checkpoint by what its configuration says, asked as the plan asks: without torch and transformers."""

from __future__ import annotations

import re
from importlib.metadata import files
from typing import Any

import pytest

from featherweight.model.facts import CheckpointFacts, Values
from featherweight.runtimes.candidate import Candidate
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.torch.quantized_runtime import NO_LINEAR, READ_TYPES, READ_WEIGHTS
from featherweight.runtimes.vllm.known import float_refusal, left_out_refusal

USUAL = {
    "model_type": "llama",
    "is_encoder_decoder": False,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "hidden_size": 128,
}


def refusal(engine: str, **told: Any) -> str:
    config = Values({"class": "LlamaConfig", "names": {}, "values": USUAL | {"architectures": ["LlamaForCausalLM"]} | told})
    spec = RUNTIMES[engine].spec.model_validate({"engine": engine, **({"optimize": None} if engine == "onnxruntime" else {})})
    return RUNTIMES[engine].model_refusal(spec, Candidate(CheckpointFacts(config), 128)) or ""


def test_a_type_that_ctranslate2_reads_as_an_encoder_writes_nothing_there() -> None:
    told = {"model_type": "bert", "class": "BertConfig", "architectures": ["BertLMHeadModel"], "is_decoder": True}
    assert "reads bert models as encoders, and this one writes" in refusal("ctranslate2", **told)


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({}, ""),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": {}}},
            "one kind of rotary embeddings",
        ),
        ({"rope_parameters": {"rope_type": "yarn"}}, r"rotary embeddings \(yarn\)"),
        ({"rope_parameters": {"rope_type": "llama3"}}, ""),
        ({"model_type": "mistral", "rope_parameters": {"rope_type": "llama3"}}, r"rotary embeddings \(llama3\)"),
        ({"model_type": "qwen2", "rope_parameters": {"rope_type": "dynamic"}}, r"rotary embeddings \(dynamic\)"),
        ({"model_type": "hunyuan_v1_dense", "rope_parameters": {"rope_type": "dynamic"}}, "wants the alpha"),
        ({"model_type": "hunyuan_v1_dense", "rope_parameters": {"rope_type": "dynamic", "alpha": 9.0}}, ""),
        (
            {"model_type": "phi", "rope_parameters": {"partial_rotary_factor": 0.25}},
            "multiple of 16 rotary channels in each head, these have 8 of 32",
        ),
        ({"model_type": "phi", "partial_rotary_factor": 0.5}, ""),
        ({"partial_rotary_factor": 0.5}, "rotates 16 of 32 channels as config.json says, and transformers all channels of a llama"),
        ({"model_type": "phi3", "original_max_position_embeddings": 4096}, "two context lengths differ"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "no layers of linear attention"),
        ({"clip_qkv": 8.0}, "overlooks what llama does to queries and keys"),
        ({"hidden_act": "quick_gelu"}, "makes no quick_gelu, which is this llama's activation"),
        ({"hidden_act": "gelu_new"}, ""),
    ],
)
def test_the_graph_of_genai_is_refused_where_its_builder_makes_another(told: dict[str, Any], reason: str) -> None:
    found = refusal("onnxruntime-genai", **told)
    assert re.search(reason, found) if reason else not found


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"model_type": "gemma2", "attn_logit_softcapping": 50.0}, "leave out the soft cap on attention that this gemma2 has"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scales attention by the number of the layer"),
        ({"model_type": "falcon", "new_decoder_architecture": True}, "falcon of the new decoder architecture"),
        ({"model_type": "phi", "num_key_value_heads": 2}, "a phi whose heads share their keys"),
        ({"model_type": "phi3", "rope_parameters": {"rope_type": "longrope"}}, "not this phi3's rotary embeddings (longrope)"),
        (
            {
                "model_type": "bart",
                "is_encoder_decoder": True,
                "architectures": ["BartForConditionalGeneration"],
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 4,
            },
            "a bart whose stacks differ in their heads",
        ),
    ],
)
def test_what_the_graphs_of_optimum_leave_out_is_refused(told: dict[str, Any], reason: str) -> None:
    assert reason in refusal("onnxruntime", **told)
    assert not refusal("onnxruntime", model_type=told["model_type"])


@pytest.mark.parametrize(
    ("kind", "told", "scaled"),
    [
        ("phi3", {"rope_type": "longrope", "partial_rotary_factor": 0.75, "original_max_position_embeddings": 256}, "longrope"),
        ("phi3", {"rope_type": "longrope", "original_max_position_embeddings": 256}, ""),
        ("phi", {"rope_type": "yarn", "partial_rotary_factor": 0.5}, "yarn"),
        ("phi", {"rope_type": "yarn", "partial_rotary_factor": 0.5, "attention_factor": 1.0}, ""),
        ("phi", {"rope_type": "linear", "partial_rotary_factor": 0.5}, ""),
        ("falcon", {"rope_type": "yarn"}, "yarn"),
        ("llama", {"rope_type": "yarn"}, ""),
    ],
)
def test_ctranslate2_scales_whole_heads_where_rotary_embeddings_scale_a_part(kind: str, told: dict[str, Any], scaled: str) -> None:
    found = refusal("ctranslate2", model_type=kind, rope_parameters=told)
    assert f"this {kind}'s rotary embeddings ({scaled}) scale what they rotate" in found if scaled else not found


@pytest.mark.parametrize("kind", ["flaubert", "xlm", "layoutlm", "longformer", "qwen3_moe", "trocr"])
def test_graphs_that_cannot_be_served_from_are_refused(kind: str) -> None:
    assert f"Optimum's graph of a {kind} model" in refusal("onnxruntime", model_type=kind)


def test_a_compiled_step_is_refused_to_models_without_keys_and_values() -> None:
    for engine in ("torch-compile", "openvino"):
        assert "a mamba2 model keeps no keys and values" in refusal(engine, model_type="mamba2")
    assert not refusal("torch-compile")
    both_ways = {"model_type": "xlm", "architectures": ["XLMWithLMHeadModel"]}
    assert refusal("torch-compile", **both_ways, causal=True) and not refusal("torch-compile", **both_ways, causal=False)


@pytest.mark.parametrize(
    ("engine", "kind", "reason"),
    [
        ("torch-compile", "gpt_neo", "it takes the length of its cache, which stays the same, for that of the text"),
        ("torch-compile", "mpt", "makes no whole graph of transformers' mpt: it counts on the host what it has read"),
        ("torch-compile", "minimax", "keeps what it has read in a cache of its own; take another engine"),
        ("torch-aoti", "hrm_text", "compiled step of a hrm_text writes other tokens"),
        ("openvino", "longformer", "transformers' longformer cuts or pads each text to whole blocks; take another engine"),
        ("openvino", "longcat_flash", "asks each text which experts it needs"),
        ("openvino", "jetmoe", "is a trace, and transformers' jetmoe reads the weights of the experts that were chosen"),
    ],
)
def test_what_no_graph_holds_is_refused(engine: str, kind: str, reason: str) -> None:
    assert reason in refusal(engine, model_type=kind)


@pytest.mark.parametrize(
    ("layers", "other"),
    [
        (["full_attention", "sliding_attention", "chunked_attention"], ""),
        (["linear_attention", "full_attention"], "has layers of linear_attention"),
        (["conv", "hybrid"], "has layers of conv and hybrid"),
    ],
)
def test_layers_that_keep_no_keys_and_values_are_refused_where_the_step_has_no_other_place(layers: list[str], other: str) -> None:
    found = refusal("openvino", layer_types=layers)
    assert other in found if other else not found


@pytest.mark.parametrize(
    ("told", "ctranslate2", "vllm"),
    [
        ({"hidden_act": "silu"}, "", ""),
        ({"hidden_act": "relu"}, "computes silu in llama models, and this one's activation is relu", "vLLM computes silu in llama"),
        ({"model_type": "falcon", "activation": "relu"}, "computes gelu in falcon models", ""),
        ({"model_type": "gpt_neox", "hidden_act": "relu"}, "", ""),
        (
            {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True},
            "attention that is scaled by the number of the layer, which this gpt2 has",
            "vLLM's gpt2 knows no scale_attn_by_inverse_layer_idx",
        ),
        ({"model_type": "gpt2", "scale_attn_weights": False}, "attention that is not scaled by the width of the heads", ""),
        ({"model_type": "gpt2", "reorder_and_upcast_attn": True}, "", "vLLM's gpt2 knows no reorder_and_upcast_attn"),
        ({"model_type": "gpt_bigcode", "multi_query": False}, r"keys and values for every head.*\(multi_query\)", ""),
        ({"model_type": "falcon", "multi_query": False}, "", ""),
        (
            {"model_type": "falcon", "hidden_size": 64, "ffn_hidden_size": 192},
            "",
            "no ffn_hidden_size but four times its width, not 192",
        ),
        ({"model_type": "falcon", "ffn_hidden_size": 512}, "", ""),
        ({"model_type": "opt", "layer_norm_elementwise_affine": False}, "norms without weights of their own", ""),
        ({"model_type": "deepseek_v3"}, "", "topk_method: noaux_tc; say so in its config.json"),
        ({"model_type": "deepseek_v3", "topk_method": "noaux_tc"}, "", ""),
        ({"model_type": "stablelm", "qk_layernorm": True}, "norms of queries and keys", "vLLM's stablelm knows no qk_layernorm"),
        *(
            (
                {"model_type": kind, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 512},
                "",
                f"vLLM's {kind} has a sliding window in all layers or in none",
            )
            for kind in ("qwen2", "qwen3")
        ),
        ({"model_type": "bloom", "apply_residual_connection_post_layernorm": True}, "residuals that begin behind the norms", ""),
    ],
)
def test_what_no_module_of_an_engine_computes_is_refused_by_the_key_that_asks_for_it(
    told: dict[str, Any], ctranslate2: str, vllm: str
) -> None:
    for engine, reason in (("ctranslate2", ctranslate2), ("vllm", vllm)):
        found = refusal(engine, **told)
        assert re.search(reason, found) if reason else not found


def test_a_model_without_attention_has_no_heads_to_refuse() -> None:
    values = {"model_type": "mamba", "is_encoder_decoder": False, "hidden_size": 128}
    config = Values({"class": "MambaConfig", "names": {}, "values": values})
    spec = RUNTIMES["vllm"].spec.model_validate({"engine": "vllm"})
    assert RUNTIMES["vllm"].model_refusal(spec, Candidate(CheckpointFacts(config), 128)) is None


@pytest.mark.parametrize(
    ("engine", "switch", "reason"),
    [
        (
            "torch-dynamic",
            127,
            "this phi3 is read anew behind 127 tokens: its texts would depend on how they are read; take another engine",
        ),
        ("torch-dynamic", 128, ""),
        ("torch-static", 127, ""),
        ("torchao-int8-dynamic", 127, "its texts would depend on how they are read"),
        ("torchao-int8-dynamic", 128, ""),
    ],
)
def test_what_is_rounded_by_all_that_is_read_at_once_is_read_in_one_way_only(engine: str, switch: int, reason: str) -> None:
    """PyTorch's dynamic layers take one range for all tokens, and behind the switch of longrope all are read anew.

    torchao's take one for each, and yet wrote another text where two tokens were 0.004 nats apart.
    """
    longrope = {"rope_type": "longrope", "original_max_position_embeddings": switch}
    found = refusal(engine, model_type="phi3", rope_parameters=longrope)
    assert reason in found if reason else not found


@pytest.mark.parametrize(
    ("told", "tokens", "reason"),
    [
        ({}, 100, ""),
        ({}, 101, "as those beyond 100 tokens .longrope. where it serves up to 101; serve at most 100"),
        ({"factor": 4.0}, 100, ""),
        ({"factor": 2.0}, 100, r"by 1\.141, not by 1\.073"),
        ({"attention_factor": 1.0}, 100, r"by 1\.141, not by 1;"),
        ({"attention_factor": 1.0, "short_mscale": 1.0}, 100, ""),
    ],
)
def test_longrope_on_vllm_is_served_where_it_rotates_as_transformers_does(told: dict[str, Any], tokens: int, reason: str) -> None:
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 100, **told}
    config = Values({"class": "", "values": {"max_position_embeddings": 400, "rope_parameters": rope}, "names": {}})
    found = left_out_refusal("phi3", config, tokens) or ""
    assert re.search(reason, found) if reason else not found


@pytest.mark.parametrize(
    ("kind", "told", "reason"),
    [
        ("hrm_text", {}, "reads a prompt in both directions"),
        ("dbrx", {}, "while it loads its experts"),
        ("mamba2", {"n_groups": 8}, "in 8 groups, and transformers as a whole"),
        ("mamba2", {"n_groups": 1}, ""),
        ("cohere2", {"sliding_window": 63}, "one token beyond its window of 63; serve at most 63"),
        ("cohere2", {"sliding_window": 64}, ""),
        ("cohere2", {"sliding_window": 63, "layer_types": ["full_attention"]}, ""),
        ("lfm2", {}, "wants block_dim"),
        ("lfm2", {"block_dim": 64}, ""),
        ("glm4_moe", {}, "wants head_dim"),
        ("glm4_moe", {"head_dim": 128}, ""),
        ("minimax_m2", {"head_dim": 128}, "wants rotary_dim"),
        ("gpt_oss", {"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 64}}, "beta_fast and beta_slow"),
        (
            "gpt_oss",
            {"rope_parameters": {"beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 64, "rope_type": "yarn"}},
            "",
        ),
    ],
)
def test_what_vllm_ends_with_an_error_at_is_refused(kind: str, told: dict[str, Any], reason: str) -> None:
    found = left_out_refusal(kind, Values({"class": "", "values": told, "names": {}}), 64) or ""
    assert reason in found if reason else not found


def test_an_activation_that_vllm_rounds_is_not_served_as_float32() -> None:
    assert "compute_type: bfloat16" in (float_refusal("apertus", "float32") or "")
    assert float_refusal("apertus", "bfloat16") is None and float_refusal("llama", "float32") is None


def test_texts_of_two_types_are_refused_where_the_graph_is_told_none() -> None:
    told = {"model_type": "roberta", "architectures": ["RobertaForSequenceClassification"]}
    assert "is told no token types, of which this one has 2" in refusal("onnxruntime", **told, type_vocab_size=2)
    assert not refusal("onnxruntime", **told, type_vocab_size=1)
    assert not refusal("onnxruntime", model_type="roberta", architectures=["RobertaForMaskedLM"], type_vocab_size=2)


@pytest.mark.parametrize("kind", ["hrm_text", "mobilebert"])
def test_what_is_rounded_at_ties_is_not_enlarged(kind: str) -> None:
    assert "at a tie" in refusal("torchao-int8-dynamic", model_type=kind)
    assert not refusal("torchao-int8", model_type=kind)


@pytest.mark.parametrize("kind", NO_LINEAR)
def test_blocks_without_a_linear_are_not_packed(kind: str) -> None:
    from transformers import AutoConfig, AutoModel

    sizes = {"hidden_size": 16, "embedding_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1}
    model = AutoModel.from_config(AutoConfig.for_model(kind, **sizes))
    assert not any(type(part).__name__ == "Linear" for name, part in model.named_modules() if ".layer" in name)
    assert "packs Linear alone" in refusal("torchao-int4", model_type=kind)


@pytest.mark.parametrize("kind", [*READ_WEIGHTS, *READ_TYPES])
def test_layers_whose_weights_transformers_reads_itself_are_not_packed(kind: str) -> None:
    where = f"transformers/models/{kind}/modeling_{kind}.py"
    source = next(file for file in files("transformers") or () if file.as_posix() == where).locate().read_text()
    assert re.search(r"self\.\w+\.weight\b|\(nn\.Linear\):", source)
    assert "reads the weights" in refusal("torch-dynamic", model_type=kind)
    assert bool(refusal("torchao-int8", model_type=kind)) == (kind in READ_WEIGHTS)


@pytest.mark.parametrize(
    ("asked", "start", "reason"),
    [
        ({"repetition_penalty": 1.2}, 2, "one that ends a text too, in repetition_penalty"),
        ({"no_repeat_ngram_size": 1}, 2, "in no_repeat_ngram_size"),
        ({"no_repeat_ngram_size": 2}, 2, ""),
        ({"repetition_penalty": 1.2}, 0, ""),
    ],
)
def test_penalties_that_miss_the_end_that_targets_begin_with_are_refused(asked: dict[str, Any], start: int, reason: str) -> None:
    """BART's targets begin with </s>, which transformers penalizes from the first token on; CTranslate2 ended too soon."""
    told = {"model_type": "bart", "is_encoder_decoder": True, "architectures": ["BartForConditionalGeneration"]}
    config = Values({"class": "BartConfig", "names": {}, "values": USUAL | told})
    generation = Values({"values": {"eos_token_id": 2, "decoder_start_token_id": start} | asked, "names": {}})
    spec = RUNTIMES["ctranslate2"].spec.model_validate({"engine": "ctranslate2"})
    found = RUNTIMES["ctranslate2"].model_refusal(spec, Candidate(CheckpointFacts(config, generation), 128)) or ""
    assert reason in found if reason else not found
