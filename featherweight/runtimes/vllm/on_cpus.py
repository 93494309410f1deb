"""What vLLM does not compute on CPUs, as rules: each with where in the package of its release 0.32 it was found.

Nothing is refused where its toolchain is not installed and its own files would have to say so, or where they say otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from featherweight.model.positions import head_width
from featherweight.runtimes.vllm.installed import (
    KERNELS,
    LATENT_ATTENTION,
    has_attention_kernel,
    latent_types,
    modules_by_architecture,
    widths,
)
from featherweight.system.machine import describe
from featherweight.system.toolchains import holds_text, text_of

PLATFORM, SPARSE = "vllm/platforms/cpu.py", "Sparse Attention is not supported on CPU"
ROUTER, SOFTMAX_ALONE = "vllm/model_executor/layers/fused_moe/router/cpu_router.py", 'assert self.scoring_func == "softmax"'
ROUTED_OTHERWISE = {
    "ernie4_5_moe": "without the bias that is learned for it (e_score_correction_bias)",
    "laguna": "by softmax alone, and not by sigmoid",
    "minimax_m2": "by softmax alone, and not by sigmoid",
    "minimax_m3_vl_text": "by softmax alone, and not by sigmoid",
}
"""How its router for CPUs chooses experts of model types whose modules ask for more."""
WITH_PICTURES = ("qwen3_5_moe_text", "qwen3_5_text")
"""Model types whose module reads pictures too, by torchvision, which its toolchain leaves out: its wheels are for CUDA."""
GATED_DELTA = (*WITH_PICTURES, "qwen3_next")
"""Model types with gated delta nets."""
HEADS_APART = ("lfm2", "lfm2_moe")
"""Model types whose modules hand their heads apart to rotary embeddings, as those with compressed keys do."""
BLOCK = 128
"""Tokens of a block of its cache: a chunk of attention is so many blocks."""
MIXER, SCAN = "mamba.mamba_mixer import", "selective_scan_fwd"
"""Whoever imports the first one, Mamba's first version, computes with the second, if its compiled code has that."""


@dataclass(frozen=True)
class Asked:
    """A model that is to be served, by its configuration, and the type that it is computed in."""

    whole: Any
    compute_type: str

    @property
    def config(self) -> Any:
        """Of the part that reads and writes text."""
        return self.whole.get_text_config()

    @property
    def kind(self) -> str:
        """Its model type."""
        return str(self.config.model_type)

    @property
    def architectures(self) -> tuple[str, ...]:
        """The classes that its configuration names."""
        return tuple(getattr(self.whole, "architectures", None) or ())

    def told(self, name: str) -> Any:
        """What its configuration says, None where that is nothing."""
        return getattr(self.config, name, None)


@dataclass(frozen=True)
class Rule:
    """applies: whether a model is one that is not served. reason: why, in one line. source: the file below vLLM's package."""

    applies: Callable[[Asked], object]
    reason: Callable[[Asked], str]
    source: str
    way_out: str = "take another engine"


def refusal(config: Any, compute_type: str) -> str | None:
    """Why a model is not served from a CPU in a type, by the first rule that applies; None where it is."""
    asked = Asked(config, compute_type)
    rule = next((rule for rule in RULES if rule.applies(asked)), None)
    return None if rule is None else f"{rule.reason(asked)}; {rule.way_out}"


def wants_bfloat16(compute_type: str) -> bool:
    """Whether it is served in bfloat16 here: on CPUs with AMX its kernel for W8A8 reads no float32, and dies of float16."""
    return compute_type == "int8" and "amx_tile" in describe().cpu_features


def rotates_heads_apart(config: Any) -> bool:
    """Whether rotary embeddings are given a model's heads apart: its kernel for CPUs turns other numbers then than those."""
    config = config.get_text_config()
    return config.model_type in HEADS_APART or bool(getattr(config, "kv_lora_rank", None) and config.model_type in latent_types())


def _lacks_torchvision(asked: Asked) -> bool:
    return asked.kind in WITH_PICTURES and bool(modules_by_architecture()) and not text_of("vllm", "torchvision/__init__.py")


def _is_sparse(asked: Asked) -> bool:
    """DeepSeek-V4's has kernels for CPUs with AMX."""
    has_kernels = asked.kind == "deepseek_v4" and "amx_tile" in describe().cpu_features
    return bool(asked.told("index_topk")) and SPARSE in text_of("vllm", PLATFORM) and not has_kernels


def _is_for_gpus(asked: Asked) -> bool:
    """Some modules are kept apart by makers of hardware, in a folder for each."""
    modules = (modules_by_architecture().get(name, "") for name in asked.architectures)
    folders = [module.replace(".", "/") for module in modules if module.startswith("vllm.models.")]
    apart = any(text_of("vllm", f"{folder}/__init__.py") for folder in folders)
    return apart and not any(text_of("vllm", f"{folder}/cpu/model.py") for folder in folders)


def _has_heads_without_kernel(asked: Asked) -> bool:
    """Without attention there are no heads."""
    known, width = _known_widths(asked), _width(asked)
    if not asked.told("num_attention_heads") or not known or width is None or width in known:
        return False
    return _latent_width(asked) is not None or not has_attention_kernel(width)


def _known_widths(asked: Asked) -> tuple[int, ...]:
    return widths(LATENT_ATTENTION) if _latent_width(asked) else widths()


def _width(asked: Asked) -> int | None:
    """Of a head, whose channels are of two kinds where its keys were compressed; compressed keys have kernels of their own."""
    if not asked.told("kv_lora_rank"):
        return head_width(asked.config)
    return _latent_width(asked) or int(asked.config.qk_nope_head_dim) + int(asked.config.qk_rope_head_dim)


def _latent_width(asked: Asked) -> int | None:
    """Of compressed keys as they are kept; None where they are not. In transformers' own module it takes their heads for it."""
    rank, known = asked.told("kv_lora_rank"), modules_by_architecture()
    if rank and asked.kind in latent_types():
        return int(rank) + int(asked.config.qk_rope_head_dim)
    return head_width(asked.config) if rank and known and not any(name in known for name in asked.architectures) else None


def _scans_without_kernel(asked: Asked) -> bool:
    modules = (modules_by_architecture().get(name) for name in asked.architectures)
    mixed = any(MIXER in text_of("vllm", f"vllm/model_executor/models/{module}.py") for module in modules if module)
    return mixed and not holds_text("vllm", KERNELS, SCAN)


def _has_ungated_experts(asked: Asked) -> bool:
    """Some Nemotron-H have layers of experts."""
    return asked.kind == "nemotron_h" and "moe" in (asked.told("layers_block_type") or asked.told("layer_types") or ())


def _has_broken_chunks(asked: Asked) -> bool:
    return "chunked_attention" in (asked.told("layer_types") or ()) and (asked.told("attention_chunk_size") or 0) % BLOCK != 0


RULES = (
    Rule(
        _lacks_torchvision,
        lambda asked: f"vLLM's module for {asked.kind} models wants torchvision, which its toolchain for CPUs leaves out",
        "model_executor/models/qwen3_5.py",
    ),
    Rule(
        lambda asked: asked.kind in ("kimi_linear", "olmo_hybrid"),
        lambda asked: f"vLLM computes the linear attention of {asked.kind} models on GPUs alone",
        "model_executor/layers/mamba/gdn: kimi_gdn_linear_attn.py, olmo_gdn_linear_attn.py",
    ),
    Rule(
        lambda asked: asked.kind in GATED_DELTA and asked.compute_type != "bfloat16",
        lambda asked: f"vLLM computes the linear attention of {asked.kind} models on CPUs in bfloat16 alone",
        "model_executor/layers/mamba/ops/cpu/gdn_attention.py",
        way_out="take compute_type: bfloat16",
    ),
    Rule(
        _is_sparse,
        lambda asked: f"vLLM's attention on CPUs looks at all tokens, and {asked.kind} models at those that they choose",
        "platforms/cpu.py: get_attn_backend_cls",
    ),
    Rule(
        _is_for_gpus,
        lambda asked: f"vLLM has its module for {asked.kind} models for GPUs alone",
        "models: the folders of inkling, minimax_m3, qwen4_exp",
    ),
    Rule(
        _has_heads_without_kernel,
        lambda asked: (
            f"vLLM's attention on CPUs has heads of {', '.join(map(str, _known_widths(asked)))} channels, "
            f"and these have {_width(asked)}"
        ),
        "v1/attention/backends: cpu_attn.py, mla/cpu_mla.py",
    ),
    Rule(
        _scans_without_kernel,
        lambda asked: f"vLLM's build for CPUs has no kernel for the scans of {asked.kind} models (Mamba)",
        "model_executor/layers/mamba/mamba_mixer.py",
    ),
    Rule(
        lambda asked: asked.kind in ROUTED_OTHERWISE and SOFTMAX_ALONE in text_of("vllm", ROUTER),
        lambda asked: f"vLLM's router on CPUs chooses the experts of {asked.kind} models {ROUTED_OTHERWISE[asked.kind]}",
        "model_executor/layers/fused_moe/router/cpu_router.py",
    ),
    Rule(
        _has_ungated_experts,
        lambda asked: f"vLLM's experts on CPUs are gated, and those of this {asked.kind} are not",
        "model_executor/layers/fused_moe/experts/cpu_moe.py: _supports_no_act_and_mul",
    ),
    Rule(
        _has_broken_chunks,
        lambda asked: (
            f"vLLM's attention on CPUs has chunks of a multiple of {BLOCK} tokens, "
            f"and these have {asked.config.attention_chunk_size}"
        ),
        "v1/attention/backends/utils.py: make_local_attention_virtual_batches",
    ),
)
"""The first that applies is told."""
