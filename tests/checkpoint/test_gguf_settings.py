"""What a GGUF file says of its model is what the configuration says that is made of it; what it cannot say is refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conformance.tiny import Case, make
from featherweight.checkpoint.facts import read_facts
from featherweight.checkpoint.gguf_header import SHAPES, GgufHeader, GgufTensor
from featherweight.checkpoint.gguf_settings import misplaced, put_right
from featherweight.checkpoint.gguf_tokenizer import gguf_tokenizer
from featherweight.checkpoint.opening import load_model
from featherweight.checkpoint.saving import save_tokenizer
from featherweight.checkpoint.spec import LoadSpec
from featherweight.checkpoint.tokenizer import load_tokenizer
from featherweight.errors import CheckpointError
from featherweight.runtimes.llama_cpp.vocabulary import Vocabulary
from featherweight.runtimes.llama_cpp.write import write_file
from tasks.load import load
from tests.support.gguf_files import write_gguf

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 40}


def setting(value: Any) -> bytes:
    """A setting as a file holds it."""
    if isinstance(value, str):
        return struct.pack("<IQ", 8, len(value)) + value.encode()
    if isinstance(value, list):
        return struct.pack(f"<IIQ{len(value)}?", 9, 7, len(value), *value)
    return struct.pack("<I?", 7, value) if isinstance(value, bool) else struct.pack("<If", 6, value)


def header(architecture: str, said: dict[str, Any] | None = None, tensors: tuple[str, ...] = ()) -> GgufHeader:
    told = {f"{architecture}.{name}": setting(value) for name, value in (said or {}).items()}
    named = {"general.architecture": setting(architecture), SHAPES: setting("{}")}  # whatever shapes they have
    return GgufHeader(named | told, {name: GgufTensor(0, (4,), 0, 16) for name in tensors})


def test_numbers_truths_and_arrays_are_read() -> None:
    found = header("llama", {"a": 3, "b": True, "c": [True, False], "d": "text"})
    assert [found.number(f"llama.{name}") for name in "abcde"] == [3, 1, None, None, None]
    assert [found.numbers(f"llama.{name}") for name in "abcde"] == [[3], [1], [1, 0], None, None]


@pytest.mark.parametrize(
    ("model_type", "architecture", "says", "wanted"),
    [
        ("starcoder2", "starcoder2", {"rope.freq_base": 1e6}, {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}),
        ("nemotron", "nemotron", {"attention.layer_norm_epsilon": 0.5}, {"norm_eps": 0.5}),
        ("lfm2", "lfm2", {"attention.layer_norm_rms_epsilon": 0.5}, {"norm_eps": 0.5}),
        ("phi3", "phi3", {"attention.sliding_window": 2047}, {"sliding_window": 2047}),
        ("qwen3", "qwen3", {"attention.key_length": 16, "attention.value_length": 16}, {"head_dim": 16}),
        ("gpt2", "gpt2", {"context_length": 77, "feed_forward_length": 96}, {"n_positions": 77, "n_inner": 96}),
        ("gemma2", "gemma2", {"final_logit_softcapping": 8}, {"final_logit_softcapping": 8.0, "query_pre_attn_scalar": 256}),
        ("gemma3_text", "gemma3", {"attention.sliding_window_pattern": [True, False]},
         {"layer_types": ["sliding_attention", "full_attention"]}),
        ("qwen2_moe", "qwen2moe", {"expert_feed_forward_length": 24, "expert_shared_feed_forward_length": 8},
         {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 8}),
        ("falcon", "falcon", {"attention.head_count_kv": 1, "attention.causal": True}, {"multi_query": True}),
        ("llama", "llama", {"expert_count": 0, "context_length": 9, "pooling_type": 3}, {}),
    ],
)  # fmt: skip
def test_what_transformers_leaves_at_a_default_is_what_the_file_says(
    model_type: str, architecture: str, says: dict[str, Any], wanted: dict[str, Any]
) -> None:
    config = AutoConfig.for_model(model_type, **SIZES)
    put_right(config, header(architecture, says))
    assert {name: getattr(config, name) for name in wanted} == wanted


def test_the_largest_gemma_scales_attention_by_its_width() -> None:
    config = AutoConfig.for_model("gemma2", hidden_size=4608, num_attention_heads=32, num_hidden_layers=46, head_dim=128)
    put_right(config, header("gemma2"))
    assert config.query_pre_attn_scalar == 144


@pytest.mark.parametrize(
    ("model_type", "says", "reason"),
    [
        (
            "llama",
            {"expert_count": 8},
            r"llama\.expert_count is 8, which transformers takes no notice of in GGUF files: it would be",
        ),
        ("llama", {"logit_scale": 0.5}, r"llama\.logit_scale is 0\.5, which"),
        ("llama", {"attention.causal": False}, r"llama\.attention\.causal is 0, which"),
        ("llama", {"feed_forward_length": [True, False]}, r"llama\.feed_forward_length, which"),
        ("llama", {"attention.key_length": 16, "attention.value_length": 8}, "heads of two widths"),
        ("llama", {"rope.dimension_count": 8}, r"llama\.rope\.dimension_count is 8 of heads of 16, which a llama of transformers"),
        ("falcon", {"attention.head_count_kv": 2}, r"falcon\.attention\.head_count_kv is 2, which"),
        ("t5", {}, "a t5 is not read from GGUF files; give the folder that the file was made from"),
    ],
)
def test_what_no_configuration_says_is_refused(model_type: str, says: dict[str, Any], reason: str) -> None:
    config = AutoConfig.for_model(model_type, **(SIZES if model_type != "t5" else {}))
    with pytest.raises(CheckpointError, match=reason):
        put_right(config, header(model_type, says))


NAMED = ("token_embd.weight", "output_norm.weight", "output.weight")
LAYER = ("attn_q", "attn_k", "attn_v", "attn_output", "attn_norm", "ffn_gate", "ffn_up", "ffn_down", "ffn_norm")
WHOLE = (*NAMED, *(f"blk.{layer}.{part}.weight" for layer in range(2) for part in LAYER))


@pytest.mark.parametrize(
    ("more", "less", "reason"),
    [
        ((), (), None),
        (("rope_freqs.weight",), (), None),
        (
            ("blk.1.attn_q_norm.weight",),
            (),
            "blk.1.attn_q_norm.weight has no place in LlamaForCausalLM, so that",
        ),
        ((), ("blk.1.ffn_up.weight",), "it has nothing for model.layers.1.mlp.up_proj.weight of LlamaForCausalLM"),
    ],
)
def test_a_tensor_that_is_left_out_or_lacking_is_named(more: tuple[str, ...], less: tuple[str, ...], reason: str | None) -> None:
    config = AutoConfig.for_model("llama", **SIZES, tie_word_embeddings=False, architectures=["LlamaForCausalLM"])
    found = misplaced(config, header("llama", tensors=tuple(name for name in (*WHOLE, *more) if name not in less)))
    assert found is None if reason is None else str(found).startswith(reason)


@pytest.mark.slow
def test_biases_of_a_llama_are_read(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """transformers left them out: 7.8 nats off in silence."""
    config = AutoConfig.from_pretrained(tiny_checkpoint, attention_bias=True, mlp_bias=True)
    torch.manual_seed(0)
    right = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in right.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    right.save_pretrained(tmp_path / "biased")
    load_tokenizer(tiny_checkpoint).save_pretrained(tmp_path / "biased")
    (file,) = write_gguf(tmp_path / "m.gguf", tmp_path / "biased")
    (tmp_path / "out").mkdir()
    load(LoadSpec(source=str(file)), out=tmp_path / "out")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = torch.arange(3, 50)[None]
    with torch.no_grad():
        assert torch.equal(found(ids).logits, right(ids).logits)


def test_what_a_file_calls_a_token_of_its_own_is_cut_out_whole(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Of a byte-level tokenizer too, of which transformers knows no such tokens."""
    (file,) = write_gguf(tmp_path / "m.gguf", tiny_checkpoint, add_bos=None)
    made, given = gguf_tokenizer(file), load_tokenizer(tiny_checkpoint)
    save_tokenizer(made, tmp_path / "saved")
    for text in ("Once upon a time", f"a{given.eos_token}b {given.bos_token}"):
        assert made(text)["input_ids"] == load_tokenizer(tmp_path / "saved")(text)["input_ids"]
        assert made(text)["input_ids"] == given(text, add_special_tokens=False)["input_ids"]


def test_a_gemma_3_is_scaled_in_its_layers_without_a_window(tmp_path: Path) -> None:
    """As those of 4 B and more are; they were refused. The file is the one that llama.cpp computes with."""
    kinds = {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    case = Case("gemma3", "gemma3_text", "causal", (), {"attn_logit_softcapping": None, "rope_parameters": kinds})
    source = make(case, tmp_path / "source")
    right: Any = load_model(source).eval()
    write_file(tmp_path / "m.gguf", right, {}, Vocabulary(source, right.config.vocab_size), "float32")
    planned = read_facts(LoadSpec(source=str(tmp_path / "m.gguf"))).config.rope_parameters
    out = tmp_path / "out"
    out.mkdir()
    load(LoadSpec(source=str(tmp_path / "m.gguf")), out=out)
    found: Any = load_model(out).eval()
    for told in (planned, found.config.rope_parameters):
        assert {kind: told[kind]["rope_type"] for kind in kinds} == {"full_attention": "linear", "sliding_attention": "default"}
    ids = torch.arange(3, 3 + 120)[None]
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, right(ids).logits, rtol=0, atol=1e-4)
