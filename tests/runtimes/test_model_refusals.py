"""What engines refuse of a checkpoint by what its configuration says, asked as the plan asks: without torch and transformers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from featherweight.model.facts import CheckpointFacts, Values
from featherweight.runtimes.candidate import Candidate
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.vllm import heads

USUAL = {
    "model_type": "llama",
    "is_encoder_decoder": False,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "hidden_size": 128,
}


def refusal(engine: str, **told: Any) -> str:
    config = Values({"class": "LlamaConfig", "names": {}, "values": USUAL | {"architectures": ["LlamaForCausalLM"]} | told})
    spec = RUNTIMES[engine].spec.model_validate({"engine": engine})
    return RUNTIMES[engine].model_refusal(spec, Candidate(CheckpointFacts(config), 128)) or ""


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({}, ""),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}, "sliding_attention": {}}},
            "one kind of rotary embeddings",
        ),
        ({"rope_parameters": {"rope_type": "yarn"}}, r"rotary embeddings \(yarn\)"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "multiple of 16 rotary channels in each head, these have 8 of 32"),
        ({"partial_rotary_factor": 0.5}, ""),
        ({"model_type": "phi3", "original_max_position_embeddings": 4096}, "two context lengths differ"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "no layers of linear attention"),
        ({"clip_qkv": 8.0}, "overlooks what llama does to queries and keys"),
    ],
)
def test_the_graph_of_genai_is_refused_where_its_builder_makes_another(told: dict[str, Any], reason: str) -> None:
    found = refusal("onnxruntime-genai", **told)
    assert re.search(reason, found) if reason else not found


def toolchain(folder: Path, body: str) -> Path:
    path = folder / heads.SOURCE.replace("*", "3.11")
    path.parent.mkdir(parents=True)
    path.write_text(body)
    return folder / "bin" / "python"


def test_vllm_is_asked_which_heads_it_has_on_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "class Backend:\n    @classmethod\n    def get_supported_head_sizes(cls):\n        return [32, 64]\n"
    monkeypatch.setattr(heads, "python", lambda name: toolchain(tmp_path, source))
    heads.widths_on_cpus.cache_clear()
    try:
        assert heads.refusal(32) is None and heads.refusal(None) is None
        assert refusal("vllm", head_dim=16) == (
            "vLLM's attention on CPUs has heads of 32, 64 channels, and these have 16; take another engine"
        )
        assert not refusal("vllm", head_dim=16, kv_lora_rank=8)
    finally:
        heads.widths_on_cpus.cache_clear()


def test_a_model_without_attention_has_no_heads_to_refuse() -> None:
    values = {"model_type": "mamba", "is_encoder_decoder": False, "hidden_size": 128}
    config = Values({"class": "MambaConfig", "names": {}, "values": values})
    spec = RUNTIMES["vllm"].spec.model_validate({"engine": "vllm"})
    assert RUNTIMES["vllm"].model_refusal(spec, Candidate(CheckpointFacts(config), 128)) is None
