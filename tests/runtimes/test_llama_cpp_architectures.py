"""llama.cpp's graphs: whether the table of facts speaks of what there is, what is refused by it, and what is computed."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy
import pytest
import torch

from conformance.sizes import WINDOW
from conformance.tiny import HEAD as WIDTH
from conformance.tiny import TRAITS, Case, configuration, make, write_text
from featherweight.model.facts import CheckpointFacts
from featherweight.runtimes import parity
from featherweight.runtimes.bounds import APPROXIMATED, EXACT
from featherweight.runtimes.candidate import Candidate
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.llama_cpp.architectures import ARCHITECTURES
from featherweight.runtimes.llama_cpp.bytes_read import EMBEDDING, HEAD, POSITIONS, file_tensors
from featherweight.runtimes.llama_cpp.keys import describe
from featherweight.runtimes.llama_cpp.refusals import block_refusal, refusal
from featherweight.runtimes.llama_cpp.shapes import attention_scale, inner_width, key_heads, window_period
from featherweight.runtimes.llama_cpp.tensors import Tensors
from featherweight.runtimes.llama_cpp.vocabulary import Vocabulary
from featherweight.runtimes.llama_cpp.write import write_file
from featherweight.runtimes.spec import ExportSpec
from featherweight.runtimes.writing import load_reference, write_served
from tests.support.families import family_checkpoint
from tests.support.in_process import InProcess
from tests.support.paths import ROOT
from tests.support.tokenizers import byte_level

FULL, SLIDING = "full_attention", "sliding_attention"
ALL_FULL = {"layer_types": [FULL, FULL], "sliding_window": None}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
CONVOLUTIONS = {"num_hidden_layers": 4, "layer_types": ["conv", FULL] * 2}
PLAIN = {"rope_type": "default", "rope_theta": 1e4}


def case(kind: str, **changes: Any) -> Case:
    """A row of the conformance matrix, by its name or its model type, with `changes`."""
    model_type, told = TRAITS.get(kind, (kind, {}))
    return Case(kind, model_type, "causal", (), {**told, **changes})


def config_of(kind: str, **changes: Any) -> Any:
    return configuration(case(kind, **changes), byte_level())


def reason(config: Any, tokens: int = 128) -> str:
    return refusal(Candidate(CheckpointFacts(config), tokens)) or ""


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_fact_is_one_of_something(kind: str) -> None:
    from gguf import MODEL_ARCH_NAMES, GGUFWriter
    from transformers import CONFIG_MAPPING

    known, config = ARCHITECTURES[kind], CONFIG_MAPPING[kind]()
    assert known.name in MODEL_ARCH_NAMES.values()
    assert all(hasattr(GGUFWriter, method) for method in known.keys.values())
    for name in (*known.keys, *known.only):
        part, _, rest = name.partition(".")
        told = getattr(config, part)
        assert not rest or hasattr(told, rest)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_parameter_has_a_place_of_its_own_and_every_row_comes_once(kind: str) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(kind, **(CONVOLUTIONS if kind == "lfm2" else {})))
    tensors = Tensors(model)
    parameters = {name: value for name, value in model.named_parameters() if value.ndim < 3}
    names = [*map(tensors.name, parameters), *(name for name, *_ in tensors.experts())]
    assert len(set(names)) == len(names) and all(name.endswith((".weight", ".bias")) for name in names)
    for name, value in parameters.items():
        order = tensors.order(name)
        assert order is None or sorted(order) == list(range(value.shape[0]))


def test_rows_of_one_matrix_are_put_one_kind_behind_the_other() -> None:
    config = SimpleNamespace(model_type="falcon", num_attention_heads=4, num_kv_heads=2, hidden_size=4, num_hidden_layers=1)
    config.new_decoder_architecture, config.get_text_config = True, lambda: config
    order = Tensors(SimpleNamespace(config=config)).order("transformer.h.0.self_attention.query_key_value.weight")  # type: ignore[arg-type]
    assert order is not None and order.tolist() == [0, 1, 4, 5, 2, 6, 3, 7], "heads of one channel: q q k v, q q k v"


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        ("gptj", {}, "no GGUF file is written here for gptj models; take another engine"),
        ("granite", {"hidden_act": "gelu"}, "computes silu in granite models, not gelu"),
        ("gpt2", {"activation_function": "relu"}, "computes gelu_pytorch_tanh in gpt2 models, not relu"),
        ("gpt2, scaled by layer", {}, "computes with scale_attn_by_inverse_layer_idx False alone, and this model's is True"),
        ("gemma2, no caps", {"tie_word_embeddings": False}, "gemma2 has no head but the embedding"),
        ("gemma2", {}, "gemma2 scales attention by the width of its heads, this model otherwise"),
        ("gemma2, no caps", {"layer_types": [FULL, SLIDING]}, "windows in all layers but each nth, this model in others"),
        ("gemma2, no caps", ALL_FULL, "gemma2 has a sliding window in some layers, this model in none"),
        ("gemma3_text", {}, "gemma3 computes with attn_logit_softcapping None alone, and this model's is 5.0"),
        ("gemma3_text, wide window", {"use_bidirectional_attention": True}, "use_bidirectional_attention None alone"),
        ("gemma3_text, wide window", {"layer_types": [FULL, SLIDING]}, "windows in all layers but each nth"),
        ("phi3", {}, "does not compute phi3's sliding window of 48 tokens, and 128 are to be served; say max_tokens 48"),
        ("phi3, rope longrope", {}, "those of texts up to 64 tokens, and 128 are to be served; say max_tokens 64"),
        ("olmo2", {"tie_word_embeddings": True}, "olmo2 wants a head of its own, and this model's is its embedding"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "smollm3 leaves each 4th layer unrotated, this model others"),
        ("smollm3", {"rope_parameters": LLAMA3}, "rotary embeddings of kind llama3 are not written for llama.cpp's smollm3"),
        ("smollm3", {"mlp_bias": True}, "smollm3 computes with mlp_bias False alone"),
        ("starcoder2, no biases", {"sliding_window": None}, "starcoder2 computes with use_bias True alone"),
        ("gpt_neox", {"hidden_size": 60, "num_attention_heads": 3}, "rotates pairs of channels, and these heads have 5"),
        ("phi, norms of queries and keys", {}, "phi2 computes with qk_layernorm False alone"),
        ("stablelm, norms of queries and keys", {}, "stablelm computes with qk_layernorm False alone"),
        ("cohere, norms of queries and keys", {}, "command-r with 2 layers has no norms of queries and keys"),
        ("cohere", {"num_hidden_layers": 64}, "command-r with 64 layers has norms of queries and keys, this model otherwise"),
        ("qwen3_moe", {}, "qwen3moe computes with norm_topk_prob True alone, and this model's is False"),
        ("qwen3_moe, a dense layer", {"norm_topk_prob": True}, r"qwen3moe computes with mlp_only_layers [] alone"),
        ("olmoe", {"norm_topk_prob": True, "num_key_value_heads": 4}, "olmoe computes with norm_topk_prob False alone"),
        ("olmoe", {}, "olmoe wants as many key heads as heads, 4, these are 2"),
        ("exaone4", {}, "exaone4 has a sliding window with 64 layers alone"),
        ("exaone4", {"num_hidden_layers": 64, "layer_types": [FULL] * 64, "sliding_window": None}, "this model in none"),
        ("nemotron", {"head_dim": 48}, "nemotron wants heads that are 128 wide together, these are 192"),
        ("ernie4_5", {"use_bias": True}, "ernie4_5 computes with use_bias False alone"),
        ("seed_oss", {"attention_out_bias": True}, "seed_oss computes with attention_out_bias False alone"),
        ("mpt", {"attn_config": {"alibi_bias_max": 4}}, "mpt computes with attn_config.alibi_bias_max 8 alone"),
        ("bloom, residuals behind norms", {}, "bloom computes with apply_residual_connection_post_layernorm False alone"),
        ("qwen2, rope yarn", {"rope_parameters": YARN | {"beta_fast": 16}}, "computes YaRN with beta_fast 32 alone"),
        ("llama", {"rope_parameters": YARN | {"truncate": False}}, "computes YaRN with truncate True alone"),
        (
            "olmo3",
            {"rope_parameters": {SLIDING: PLAIN, FULL: PLAIN | {"rope_theta": 5e5}}},
            "layers with a window as all others",
        ),
        (
            "gemma3_text, wide window",
            {"rope_parameters": {SLIDING: YARN, FULL: PLAIN}},
            "layers with a window as all others",
        ),
        ("arcee", {"mlp_bias": True}, "arcee computes with mlp_bias False alone"),
        ("jais2", {"attention_bias": False}, "jais2 computes with attention_bias True alone"),
        ("gpt_bigcode", {"multi_query": False}, "starcoder computes with multi_query True alone"),
        ("qwen2_moe", {"norm_topk_prob": True}, "qwen2moe computes with norm_topk_prob False alone"),
        ("lfm2", {}, "lfm2 has layers that convolve and layers that attend, this model one kind"),
        ("falcon, alibi", {}, "falcon computes with alibi False alone"),
        ("falcon, one part behind the other", {"alibi": False}, "falcon computes with parallel_attn True alone"),
    ],
)
def test_what_it_computes_otherwise_is_refused_by_the_configuration(kind: str, changes: dict[str, Any], told: str) -> None:
    found = reason(config_of(kind, **changes))
    assert told in found and found.endswith("take another engine")


@pytest.mark.parametrize(
    ("kind", "changes", "tokens"),
    [
        *((kind, {}, 128) for kind in ("olmo2", "granite", "smollm3", "gpt2", "gpt_neox", "phi", "stablelm", "cohere", "cohere2")),
        *((kind, {}, 128) for kind in ("glm4", "ernie4_5", "hunyuan_v1_dense", "seed_oss", "nemotron", "mpt", "bloom", "falcon")),
        *((kind, {}, 128) for kind in ("olmo", "olmo, clipped", "olmo3", "arcee", "gpt_bigcode", "jais2", "glm", "qwen2_moe")),
        *((kind, {}, 128) for kind in ("granitemoe", "llama, rope yarn", "qwen2, rope yarn")),
        ("lfm2", CONVOLUTIONS, 128),
        ("gemma2, no caps", {"query_pre_attn_scalar": 48, "head_dim": 48}, 128),
        ("gemma3_text, wide window", {"layer_types": [FULL, FULL]}, 128),
        ("phi3", {}, WINDOW),
        ("phi3, rope longrope", {}, 64),
        ("exaone4", ALL_FULL, 128),
        ("cohere", {"num_hidden_layers": 64, "use_qk_norm": True}, 128),
        ("qwen3_moe, shares of the chosen", {}, 128),
        ("olmoe", {"num_key_value_heads": 4}, 128),
    ],
)
def test_what_it_computes_is_not_refused(kind: str, changes: dict[str, Any], tokens: int) -> None:
    config = config_of(kind, **changes)
    assert not reason(config, tokens) and not block_refusal(config)


def test_the_page_names_every_type() -> None:
    page = (ROOT / "docs" / "methods.md").read_text()
    told = page.partition("### What llama.cpp's files are written for")[2].partition("\n### ")[0]
    assert [kind for kind in ARCHITECTURES if f"`{kind}`" not in told] == []


def test_of_experts_those_are_read_that_are_asked_and_of_tables_a_row(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "m.gguf", "qwen3moe")
    for name, shape in ((EMBEDDING, (6, 8)), (HEAD, (6, 8)), (POSITIONS, (9, 8)), ("blk.0.ffn_up_exps.weight", (4, 2, 8))):
        writer.add_tensor(name, numpy.zeros(shape, "f4"))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    held = list(file_tensors(tmp_path, "m.gguf", config_of("qwen3_moe")))
    assert [(one.role, one.size_bytes, one.share) for one in held] == [
        *(("row", 192, 1.0), ("step", 192, 1.0)),
        *(("row", 288, 1.0), ("step", 256, 0.5)),
    ]


def test_nothing_is_drafted_where_layers_convolve() -> None:
    spec: Any = ExportSpec.of(engine="llama.cpp", speculation="ngram")
    for changes, told in ((CONVOLUTIONS, "cannot take back drafted tokens"), ({}, "")):
        candidate = Candidate(CheckpointFacts(config_of("lfm2" if changes else "llama", **changes)), 128)
        assert told in (RUNTIMES["llama.cpp"].model_refusal(spec, candidate) or "")


@pytest.mark.parametrize(
    ("limited", "period"),
    [("ssfssf", 3), ("sf", 2), ("sss", 4), ("ff", 1), ("fs", None), ("sffs", None), ("ssfsf", None), ("ssfss", 3)],
)
def test_layers_with_a_window_alternate_or_have_no_period(limited: str, period: int | None) -> None:
    kinds = [SLIDING if one == "s" else FULL for one in limited]
    config = SimpleNamespace(num_hidden_layers=len(kinds), layer_types=kinds, sliding_window=16)
    config.get_text_config = lambda: config
    assert window_period(config) == period


def test_sizes_are_found_by_every_name() -> None:
    assert [inner_width(config_of(kind)) for kind in ("llama", "gpt2", "bloom", "falcon, four times as wide")] == [
        192,
        192,
        512,
        512,
    ]
    falcons = ("falcon", "falcon, new architecture", "falcon, one part behind the other")
    assert [key_heads(config_of(kind)) for kind in ("llama", "gpt_neox", *falcons)] == [2, 4, 1, 2, 4]
    assert attention_scale(config_of("gemma3_text"), deep=62) == pytest.approx((WIDTH / 48) ** 0.5)
    deep = config_of("gemma3_text", num_hidden_layers=62, layer_types=[SLIDING, FULL] * 31, hidden_size=256)
    assert attention_scale(deep, deep=62) == pytest.approx((64 / 48) ** 0.5)
    assert attention_scale(config_of("llama"), deep=62) == 1.0


class Told:
    """Takes whatever is said of a model."""

    def __init__(self) -> None:
        self.said: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return lambda value: self.said.update({name.removeprefix("add_"): value})


def told_of(kind: str, **changes: Any) -> dict[str, Any]:
    """What a file says of a model."""
    writer: Any = Told()
    describe(writer, config_of(kind, **changes))
    return writer.said  # type: ignore[no-any-return]


def test_a_file_says_what_scales_and_caps_its_models_have() -> None:
    granite = told_of("granite")
    assert (granite["logit_scale"], granite["residual_scale"], granite["embedding_scale"], granite["attention_scale"]) == (
        3,
        0.4,
        6,
        0.1,
    )
    capped, free = told_of("gemma2"), told_of("gemma2, no caps")
    assert (capped["attn_logit_softcapping"], capped["final_logit_softcapping"]) == (5.0, 8.0)
    cap, logits = numpy.float32(free["attn_logit_softcapping"]), numpy.linspace(-60, 60, 99, dtype=numpy.float32)
    assert numpy.allclose(cap * numpy.tanh(logits / cap), logits, rtol=1e-6), "a cap that cuts nothing off"
    assert (capped["sliding_window"], capped["sliding_window_pattern"]) == (WINDOW, 2)
    gemma = told_of("gemma3_text, wide window")
    assert (gemma["rope_freq_base"], gemma["rope_freq_base_swa"]) == (1e6, 1e4)
    assert told_of("mpt")["max_alibi_bias"] == 8 and not told_of("gpt_neox, untwisted")["parallel_residual"]
    assert told_of("gpt_neox")["rope_dimension_count"] == WIDTH // 4 and "rope_freq_base" not in told_of("bloom")
    mixture = told_of("qwen3_moe")
    assert (mixture["expert_count"], mixture["expert_used_count"], mixture["expert_feed_forward_length"]) == (4, 2, 32)
    assert told_of("qwen2_moe")["expert_shared_feed_forward_length"] == 32
    mixed = told_of("lfm2", **CONVOLUTIONS)
    assert mixed["head_count_kv"] == [0, 2, 0, 2] and mixed["shortconv_l_cache"] == 3 and "layer_norm_rms_eps" in mixed
    assert mixed["feed_forward_length"] == 256, "two thirds of 192, in whole 256"
    scaled = told_of("qwen2, no window", rope_parameters=YARN | {"attention_factor": 1.0})
    assert scaled["rope_scaling_attn_factors"] == pytest.approx(1 / (0.1 * numpy.log(4.0) + 1))
    assert told_of("qwen2, rope yarn")["rope_scaling_attn_factors"] == pytest.approx(1.0)
    long = told_of("phi3, rope longrope")
    assert long["context_length"] == 64 and long["rope_scaling_attn_factors"] > 1
    for name, tokens in (("qwen2", 48), ("phi3", 48), ("qwen2, no window", 256), ("gemma3_text", 256)):
        assert told_of(name)["context_length"] == tokens, "a window that llama.cpp lacks ends what the file is good for"


@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changes", "precision"),
    [
        ("gemma3_text, wide window", {"sliding_window": WINDOW}, "float32"),
        ("phi3, rope longrope, short texts", {}, "int8"),
        ("cohere2", {}, "float32"),
        ("gpt2", {}, "int4"),
        ("gpt_neox", {}, "float32"),
        ("falcon, new architecture", {}, "float32"),
        ("qwen3_moe, shares of the chosen", {}, "q4_k"),
        ("mixtral", {"sliding_window": None, "rope_parameters": YARN}, "float32"),
        ("granitemoe", {}, "float32"),
        ("lfm2", CONVOLUTIONS, "int8"),
    ],
)
def test_tiny_models_of_the_families_are_what_pytorch_computes(
    kind: str, changes: dict[str, Any], precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "open_worker", InProcess)
    chosen = replace(case(kind, **changes), engines=("torch",))
    checkpoint, text = make(chosen, tmp_path / "checkpoint"), write_text(tmp_path / "text", "causal")
    spec: Any = ExportSpec.of(engine="llama.cpp", precision=precision, max_tokens=96)
    out = tmp_path / "out"
    out.mkdir()
    metrics = write_served(spec, checkpoint=checkpoint, calibration=text, out=out)
    bound = APPROXIMATED if ARCHITECTURES[chosen.model_type].approximates else EXACT
    assert metrics.get("parity_weights_max_abs", metrics["parity_max_abs"]) < bound.value


def test_the_gate_of_shared_experts_is_a_vector_as_who_reads_the_file_wants_it(tmp_path: Path) -> None:
    """It was a matrix of one row, which transformers puts a row around: the file could not be loaded again."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
    checkpoint = family_checkpoint("qwen2_moe", tmp_path / "checkpoint", **sizes, **experts)
    model = load_reference(checkpoint)
    file = tmp_path / "m.gguf"
    write_file(file, model, {}, Vocabulary(checkpoint, model.config.vocab_size), "float32")
    (gate,) = (one for one in gguf.GGUFReader(file).tensors if "shexp" in one.name and "gate_inp" in one.name)
    assert list(gate.shape) == [32]
    right = model.get_parameter("model.layers.0.mlp.shared_expert_gate.weight")[0]
    assert torch.equal(torch.from_numpy(gate.data.copy()), right)
