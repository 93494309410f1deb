"""What vLLM computes on CPUs, by what its own files say: to import it takes ten seconds.

Nothing is refused where its toolchain is not installed, or says it otherwise.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from featherweight.model.positions import head_width
from featherweight.system.machine import describe
from featherweight.system.syntax import syntax_of
from featherweight.system.toolchains import holds_text, text_of

ATTENTION, REGISTRY = "vllm/v1/attention/backends/cpu_attn.py", "vllm/model_executor/models/registry.py"
LATENT_ATTENTION = "vllm/v1/attention/backends/mla/cpu_mla.py"
"""Of keys that are kept compressed (multi-head latent attention): it has kernels for widths of its own."""
LATENT_TYPES = ("vllm/transformers_utils/model_arch_config_convertor.py", "is_deepseek_mla")
"""The function that names the model types whose keys its own modules keep so."""
PLATFORM, SPARSE = "vllm/platforms/cpu.py", "Sparse Attention is not supported on CPU"
ROUTER, SOFTMAX_ALONE = "vllm/model_executor/layers/fused_moe/router/cpu_router.py", 'assert self.scoring_func == "softmax"'
ROUTED_OTHERWISE = {
    "ernie4_5_moe": "without the bias that is learned for it (e_score_correction_bias)",
    "laguna": "by softmax alone, and not by sigmoid",
    "minimax_m2": "by softmax alone, and not by sigmoid",
}
"""How its router for CPUs chooses experts of model types whose modules ask for more."""
IN_BFLOAT16 = ("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")
"""Model types whose gated delta nets it computes on CPUs in no other type."""
IN_TRITON = ("kimi_linear", "olmo_hybrid")
"""Model types whose linear attention it has for GPUs alone."""
WITH_PICTURES = ("qwen3_5_moe_text", "qwen3_5_text")
"""Model types whose module reads pictures too, by torchvision, which its toolchain leaves out: its wheels are for CUDA."""
HEADS_APART = ("lfm2", "lfm2_moe")
"""Model types whose modules hand their heads apart to rotary embeddings, as those with compressed keys do."""
BLOCK = 128
"""Tokens of a block of its cache: a chunk of attention is so many blocks."""
TABLES = ("_TEXT_GENERATION_MODELS", "_TRANSFORMERS_SUPPORTED_MODELS")
"""Where its registry names the decoders of text that it serves, with modules of its own or with transformers'."""
ATTENTION_KERNEL = "13AttentionImplILNS_3ISAE1EfLl{width}E"
"""What its compiled code calls the attention that every CPU computes, in float32, over heads of a width."""
MIXER, SCAN, KERNELS = "mamba.mamba_mixer import", "selective_scan_fwd", "vllm/_C*.so"
"""Whoever imports the first one, Mamba's first version, computes with the second, if it is among the third."""
OTHERS = "take another engine"


def refusal(config: Any, compute_type: str) -> str | None:
    """Why a model is not served from a CPU in a type; None where it is."""
    if reason := _linear_attention_refusal(config.get_text_config().model_type, compute_type):
        return reason
    refusals = (_sparse_refusal, _heads_refusal, _scan_refusal, _router_refusal, _experts_refusal, _chunk_refusal)
    return next((reason for refused in refusals if (reason := refused(config))), None)


def wants_bfloat16(compute_type: str) -> bool:
    """Whether it is served in bfloat16 here: on CPUs with AMX its kernel for W8A8 reads no float32, and dies of float16."""
    return compute_type == "int8" and "amx_tile" in describe().cpu_features


def rotates_heads_apart(config: Any) -> bool:
    """Whether rotary embeddings are given a model's heads apart: its kernel for CPUs turns other numbers then than those."""
    config = config.get_text_config()
    return config.model_type in HEADS_APART or bool(getattr(config, "kv_lora_rank", None) and config.model_type in latent_types())


def _linear_attention_refusal(kind: str, compute_type: str) -> str | None:
    if kind in WITH_PICTURES and modules_by_architecture() and not text_of("vllm", "torchvision/__init__.py"):
        return f"vLLM's module for {kind} models wants torchvision, which its toolchain for CPUs leaves out; {OTHERS}"
    if kind in IN_TRITON:
        return f"vLLM computes the linear attention of {kind} models on GPUs alone; {OTHERS}"
    if kind in IN_BFLOAT16 and compute_type != "bfloat16":
        return f"vLLM computes the linear attention of {kind} models on CPUs in bfloat16 alone; take compute_type: bfloat16"
    return None


def _sparse_refusal(config: Any) -> str | None:
    """DeepSeek-V4's has kernels for CPUs with AMX."""
    config = config.get_text_config()
    sparse = getattr(config, "index_topk", None) and SPARSE in text_of("vllm", PLATFORM)
    if not sparse or (config.model_type == "deepseek_v4" and "amx_tile" in describe().cpu_features):
        return None
    return f"vLLM's attention on CPUs looks at all tokens, and {config.model_type} models at those that they choose; {OTHERS}"


def _heads_refusal(config: Any) -> str | None:
    """Compressed keys have kernels of their own; without attention there are no heads."""
    architectures, config = getattr(config, "architectures", None) or (), config.get_text_config()
    if not _attends(config):
        return None
    latent = _latent_width(config, architectures)
    width, known = (latent, widths(LATENT_ATTENTION)) if latent else (_width(config), widths())
    if not known or width is None or width in known or (not latent and _has_kernel(width)):
        return None
    return f"vLLM's attention on CPUs has heads of {', '.join(map(str, known))} channels, and these have {width}; {OTHERS}"


def _latent_width(config: Any, architectures: Iterable[str]) -> int | None:
    """Of compressed keys as they are kept; None where they are not. In transformers' own module it takes their heads for it."""
    rank = getattr(config, "kv_lora_rank", None)
    if rank and config.model_type in latent_types():
        return int(rank) + int(config.qk_rope_head_dim)
    known = modules_by_architecture()
    return head_width(config) if rank and known and not any(name in known for name in architectures) else None


def _width(config: Any) -> int | None:
    """Of a head, whose channels are of two kinds where its keys were compressed."""
    if getattr(config, "kv_lora_rank", None):
        return int(config.qk_nope_head_dim) + int(config.qk_rope_head_dim)
    return head_width(config)


def _has_kernel(width: int) -> bool:
    """Its list leaves out some widths that it computes, 48 among them: the compiled code knows better."""
    return holds_text("vllm", KERNELS, ATTENTION_KERNEL.format(width=width))


def _attends(config: Any) -> bool:
    return bool(getattr(config, "num_attention_heads", None))


def _scan_refusal(config: Any) -> str | None:
    modules = (modules_by_architecture().get(name) for name in getattr(config, "architectures", None) or ())
    mixed = any(MIXER in text_of("vllm", f"vllm/model_executor/models/{module}.py") for module in modules if module)
    if not mixed or holds_text("vllm", KERNELS, SCAN):
        return None
    return f"vLLM's build for CPUs has no kernel for the scans of {config.model_type} models (Mamba); {OTHERS}"


def _router_refusal(config: Any) -> str | None:
    otherwise = ROUTED_OTHERWISE.get(config.get_text_config().model_type)
    if otherwise is None or SOFTMAX_ALONE not in text_of("vllm", ROUTER):
        return None
    return f"vLLM's router on CPUs chooses the experts of {config.model_type} models {otherwise}; {OTHERS}"


def _experts_refusal(config: Any) -> str | None:
    """Of Nemotron-H, some of which have layers of experts."""
    kinds = getattr(config, "layers_block_type", None) or getattr(config, "layer_types", None) or ()
    if config.model_type != "nemotron_h" or "moe" not in kinds:
        return None
    return f"vLLM's experts on CPUs are gated, and those of this nemotron_h are not; {OTHERS}"


def _chunk_refusal(config: Any) -> str | None:
    config = config.get_text_config()
    chunk = getattr(config, "attention_chunk_size", None)
    if not chunk or chunk % BLOCK == 0 or "chunked_attention" not in (getattr(config, "layer_types", None) or ()):
        return None
    return f"vLLM's attention on CPUs has chunks of a multiple of {BLOCK} tokens, and these have {chunk}; {OTHERS}"


@cache
def widths(file: str = ATTENTION) -> tuple[int, ...]:
    """Of the heads that an attention of its has kernels for, ascending; none where nobody says."""
    said = (one.value for one in _nodes_of(file, "get_supported_head_sizes") if isinstance(one, ast.Return))
    return tuple(sorted({width for value in said if isinstance(value, ast.List) for width in ast.literal_eval(value)}))


@cache
def latent_types() -> frozenset[str]:
    """The model types whose keys its own modules keep compressed; none where nobody says."""
    compared = (one for one in _nodes_of(*LATENT_TYPES) if isinstance(one, ast.Compare) and isinstance(one.ops[0], ast.In))
    named = (one.comparators[0] for one in compared if isinstance(one.comparators[0], ast.Tuple))
    return frozenset(name for names in named for name in ast.literal_eval(names))


def _nodes_of(file: str, function: str) -> Iterator[ast.AST]:
    """What the functions of a name in one of its files are made of."""
    functions = (node for node in ast.walk(syntax_of(text_of("vllm", file))) if isinstance(node, ast.FunctionDef))
    return (node for one in functions if one.name == function for node in ast.walk(one))


@cache
def modules_by_architecture() -> dict[str, str]:
    """Which of its modules serves an architecture; none where its toolchain is not installed."""
    tables = (node for node in syntax_of(text_of("vllm", REGISTRY)).body if isinstance(node, ast.Assign | ast.AnnAssign))
    return dict(pair for node in tables if _name(node) in TABLES for pair in _entries(node.value))


def _name(node: ast.Assign | ast.AnnAssign) -> str:
    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
    return target.id if isinstance(target, ast.Name) else ""


def _entries(value: ast.expr | None) -> Iterator[tuple[str, str]]:
    for key, told in zip(value.keys, value.values, strict=True) if isinstance(value, ast.Dict) else ():
        if isinstance(key, ast.Constant) and isinstance(told, ast.Tuple):
            yield str(key.value), str(ast.literal_eval(told.elts[0]))
