"""What vLLM computes on CPUs is read from its own files, and refused in the plan where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from featherweight.errors import StageError
from featherweight.model.facts import CheckpointFacts, Values
from featherweight.runtimes.candidate import Candidate
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.interface import Limits
from featherweight.runtimes.vllm import installed, on_cpus, server
from featherweight.runtimes.vllm.known import BACKENDS
from featherweight.system import toolchains
from featherweight.system.machine import describe

HEADS = "class Backend:\n    @classmethod\n    def get_supported_head_sizes(cls):\n        return [64, 32]\n"
REGISTRY = '_TEXT_GENERATION_MODELS = {"LlamaForCausalLM": ("llama", "L"), "MambaForCausalLM": ("mamba", "M")}\n'
LATENT = 'class C:\n    def is_deepseek_mla(self):\n        return self.model_type in ("deepseek_v2", "kimi_k2")\n'
FILES = {
    installed.ATTENTION: HEADS,
    installed.LATENT_ATTENTION: HEADS.replace("[64, 32]", "[576]"),
    installed.LATENT_TYPES[0]: LATENT,
    on_cpus.PLATFORM: f"raise NotImplementedError('{on_cpus.SPARSE}.')\n",
    on_cpus.ROUTER: f"{on_cpus.SOFTMAX_ALONE}\n",
    installed.REGISTRY: REGISTRY,
    "vllm/model_executor/models/llama.py": "from vllm.layers import Linear",
    "vllm/model_executor/models/mamba.py": "from vllm.layers.mamba.mamba_mixer import MambaMixer",
    "vllm/_C.abi3.so": "causal_conv1d",
}
CACHED = (installed.widths, installed.latent_types, installed.modules_by_architecture, toolchains.holds_text)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a toolchain's packages, with a vLLM in it that says what these tests ask."""
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(toolchains, "_packages", lambda name: (tmp_path,) if name == "vllm" else ())
    for cached in CACHED:
        cached.cache_clear()
    yield tmp_path
    for cached in CACHED:
        cached.cache_clear()


def refusal(compute_type: str = "float32", **told: Any) -> str | None:
    values = {"model_type": "llama", "is_encoder_decoder": False, "max_position_embeddings": 256, "hidden_size": 128, **told}
    config = Values({"class": "LlamaConfig", "names": {}, "values": values})
    runtime = RUNTIMES["vllm"]
    spec = runtime.spec.model_validate({"engine": "vllm", "compute_type": compute_type})
    return runtime.model_refusal(spec, Candidate(CheckpointFacts(config), 128))


def test_heads_that_its_attention_has_no_kernel_for_are_refused(packages: Path) -> None:
    assert refusal(num_attention_heads=4, head_dim=16) == (
        "vLLM's attention on CPUs has heads of 32, 64 channels, and these have 16; take another engine"
    )
    assert refusal(num_attention_heads=4) is None
    toolchains.holds_text.cache_clear()
    (packages / "vllm" / "_C_AVX2.abi3.so").write_text("_ZN13cpu_attention13AttentionImplILNS_3ISAE1EfLl48E")
    assert refusal(num_attention_heads=4, head_dim=48) is None, "its list leaves out a width that its code computes"
    assert refusal(head_dim=16) is None, "no attention has no heads"


COMPRESSED = {"num_attention_heads": 4, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "head_dim": 64}


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"model_type": "deepseek_v2"}, ""),
        ({"model_type": "deepseek_v2", "kv_lora_rank": 32}, "has heads of 576 channels, and these have 96; take another engine"),
        ({"model_type": "minicpm3", "architectures": ["LlamaForCausalLM"]}, "has heads of 32, 64 channels, and these have 192"),
        ({"model_type": "minicpm3", "architectures": ["LlamaForCausalLM"], "qk_nope_head_dim": 0}, ""),
        ({"model_type": "youtu", "architectures": ["YoutuForCausalLM"]}, "has heads of 576 channels, and these have 64"),
    ],
)
def test_compressed_keys_have_kernels_of_their_own_where_vllm_keeps_them_so(
    packages: Path, told: dict[str, Any], reason: str
) -> None:
    """In a module of its own that does not, a head has both kinds of channels; of transformers' module it asks the rotated ones."""
    found = refusal(**COMPRESSED | told) or ""
    assert reason in found if reason else not found


def test_compressed_keys_are_handed_apart_from_their_rotary_part(packages: Path) -> None:
    for kind, apart in (("deepseek_v2", True), ("minicpm3", False)):
        values = {"model_type": kind, "is_encoder_decoder": False, **COMPRESSED}
        assert on_cpus.rotates_heads_apart(Values({"class": "", "names": {}, "values": values})) is apart


def test_experts_that_its_router_on_cpus_does_not_choose_as_the_model_does_are_refused(packages: Path) -> None:
    assert refusal(model_type="ernie4_5_moe") == (
        "vLLM's router on CPUs chooses the experts of ernie4_5_moe models without the bias that is learned for it "
        "(e_score_correction_bias); take another engine"
    )
    assert "by softmax alone" in (refusal(model_type="minimax_m3_vl_text") or "")
    (packages / on_cpus.ROUTER).write_text("scores = sigmoid(logits)")
    assert refusal(model_type="ernie4_5_moe") is None


def test_sparse_attention_is_refused_but_for_the_one_that_has_kernels_for_amx(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "and glm_moe_dsa models at those that they choose" in (refusal(model_type="glm_moe_dsa", index_topk=2048) or "")
    for features, refused in ((frozenset[str](), True), (frozenset({"amx_tile"}), False)):
        monkeypatch.setattr(on_cpus, "describe", lambda features=features: replace(describe(), cpu_features=features))
        assert bool(refusal(model_type="deepseek_v4", index_topk=512)) is refused


def test_modules_that_it_has_for_gpus_alone_are_refused(packages: Path) -> None:
    told = {"model_type": "qwen4_exp_text", "architectures": ["Qwen4ExpForCausalLM"]}
    registry = REGISTRY + '_TRANSFORMERS_SUPPORTED_MODELS = {"Qwen4ExpForCausalLM": ("vllm.models.qwen4_exp", "Q")}\n'
    (packages / installed.REGISTRY).write_text(registry)
    for folder, refused in (("nvidia", True), ("cpu", False)):
        (packages / "vllm" / "models" / "qwen4_exp" / folder).mkdir(parents=True)
        (packages / "vllm" / "models" / "qwen4_exp" / "__init__.py").write_text("from .nvidia.model import *\n")
        (packages / "vllm" / "models" / "qwen4_exp" / folder / "model.py").write_text("class Q: ...\n")
        assert ("module for qwen4_exp_text models for GPUs alone" in (refusal(**told) or "")) is refused


def test_a_count_of_experts_by_another_name_is_not_taken_over(packages: Path) -> None:
    for kind, refused in (("aria_text", True), ("granitemoe", False)):
        module = packages / "transformers" / "models" / kind.removesuffix("_text")
        module.mkdir(parents=True)
        (module / f"modeling_{module.name}.py").write_text(f"    {BACKENDS[0]}\n")
        found = refusal(model_type=kind, architectures=["OtherForCausalLM"]) or ""
        assert ("no module for aria_text models" in found) is refused


def test_chunks_that_are_no_blocks_of_its_cache_are_refused(packages: Path) -> None:
    chunks = {"model_type": "llama4_text", "layer_types": ["chunked_attention", "full_attention"]}
    assert refusal(**chunks, attention_chunk_size=8192) is None
    assert "chunks of a multiple of 128 tokens, and these have 48" in (refusal(**chunks, attention_chunk_size=48) or "")
    assert refusal(model_type="llama4_text", layer_types=["full_attention"], attention_chunk_size=48) is None


def test_mamba_is_refused_as_long_as_no_build_for_cpus_has_its_kernel(packages: Path) -> None:
    assert refusal(model_type="mamba", architectures=["MambaForCausalLM"]) == (
        "vLLM's build for CPUs has no kernel for the scans of mamba models (Mamba); take another engine"
    )
    assert refusal(num_attention_heads=4, architectures=["LlamaForCausalLM"]) is None
    toolchains.holds_text.cache_clear()
    (packages / "vllm" / "_C_AVX512.abi3.so").write_text("selective_scan_fwd")
    assert refusal(model_type="mamba", architectures=["MambaForCausalLM"]) is None


def test_without_the_toolchain_nothing_is_refused(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchains, "_packages", lambda name: ())
    assert refusal(num_attention_heads=4, head_dim=16) is None
    assert refusal(model_type="mamba", architectures=["MambaForCausalLM"]) is None


def test_int8_of_a_cpu_without_amx_is_not_started_on_one_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_tiles = replace(describe(), cpu_features=frozenset({"amx_tile"}))
    monkeypatch.setattr(on_cpus, "describe", lambda: with_tiles)
    monkeypatch.setattr(server, "gpus", tuple)
    assert on_cpus.wants_bfloat16("int8") and not on_cpus.wants_bfloat16("w4a16")
    for kind in ("float32", "float16"):
        with pytest.raises(StageError, match=f"written for a CPU without AMX or a GPU, in {kind}"):
            server.arguments(tmp_path, tmp_path, {"dtype": kind, "compute_type": "int8"}, Limits(1, 128, 1))


def test_a_model_that_no_module_serves_is_refused(packages: Path) -> None:
    asked = {"model_type": "mpt", "architectures": ["MptForCausalLM"]}
    assert refusal(**asked) is None, "nothing is known of what transformers says of it"
    modeling = packages / "transformers" / "models" / "mpt" / "modeling_mpt.py"
    modeling.parent.mkdir(parents=True)
    modeling.write_text("class MptForCausalLM: ...")
    assert refusal(**asked) == "vLLM has no module for mpt models; take another engine"
    for told in ("_supports_attention_backend = True", "attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)"):
        modeling.write_text(f"class MptForCausalLM:\n    {told}")
        assert refusal(**asked) is None, "vLLM runs transformers' own module"
        assert "no module for mpt models" in (refusal(**asked, layer_types=["conv", "full_attention"]) or "")
    assert refusal(architectures=["LlamaForCausalLM"]) is None


def test_the_module_of_a_model_type_may_have_another_name(packages: Path) -> None:
    modeling = packages / "transformers" / "models" / "openai" / "modeling_openai.py"
    modeling.parent.mkdir(parents=True)
    modeling.write_text("class OpenAIGPTLMHeadModel: ...")
    asked = {"model_type": "openai-gpt", "architectures": ["OpenAIGPTLMHeadModel"]}
    assert refusal(**asked) == "vLLM has no module for openai-gpt models; take another engine"


def test_experts_without_gates_are_refused(packages: Path) -> None:
    assert "experts on CPUs are gated" in (refusal(model_type="nemotron_h", layers_block_type=["linear_attention", "moe"]) or "")
    assert refusal(model_type="nemotron_h", layers_block_type=["linear_attention", "mlp"]) is None


@pytest.mark.parametrize(
    ("kind", "compute_type", "reason"),
    [
        ("kimi_linear", "bfloat16", "on GPUs alone"),
        ("qwen3_next", "float32", "in bfloat16 alone; take compute_type: bfloat16"),
        ("qwen3_next", "bfloat16", ""),
        ("qwen3_5_text", "bfloat16", "wants torchvision"),
    ],
)
def test_linear_attention_without_kernels_for_cpus_is_refused(packages: Path, kind: str, compute_type: str, reason: str) -> None:
    found = refusal(compute_type, model_type=kind) or ""
    assert reason in found if reason else not found
