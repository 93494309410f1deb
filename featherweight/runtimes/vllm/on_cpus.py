"""What vLLM computes on CPUs, by what its own files say: to import it takes ten seconds.

Nothing is refused where its toolchain is not installed, or says it otherwise.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from typing import Any

from featherweight.model.positions import head_width
from featherweight.system.machine import describe
from featherweight.system.syntax import syntax_of
from featherweight.system.toolchains import holds_text, text_of

ATTENTION, REGISTRY = "vllm/v1/attention/backends/cpu_attn.py", "vllm/model_executor/models/registry.py"
TABLES = ("_TEXT_GENERATION_MODELS", "_TRANSFORMERS_SUPPORTED_MODELS")
"""Where its registry names the decoders of text that it serves, with modules of its own or with transformers'."""
ATTENTION_KERNEL = "13AttentionImplILNS_3ISAE1EfLl{width}E"
"""What its compiled code calls the attention that every CPU computes, in float32, over heads of a width."""
MIXER, SCAN, KERNELS = "mamba.mamba_mixer import", "selective_scan_fwd", "vllm/_C*.so"
"""Whoever imports the first one, Mamba's first version, computes with the second, if it is among the third."""
OTHERS = "take another engine"


def refusal(config: Any) -> str | None:
    """Why a model is not served from a CPU; None where it is."""
    return _heads_refusal(config) or _scan_refusal(config)


def wants_bfloat16(compute_type: str) -> bool:
    """Whether it is served in bfloat16 here: on CPUs with AMX its kernel for W8A8 reads no float32, and dies of float16."""
    return compute_type == "int8" and "amx_tile" in describe().cpu_features


def _heads_refusal(config: Any) -> str | None:
    """Compressed keys have kernels of their own; without attention there are no heads."""
    config = config.get_text_config()
    width, known = head_width(config), widths()
    if not known or width is None or getattr(config, "kv_lora_rank", None) or not _attends(config) or _has_kernel(width):
        return None
    return f"vLLM's attention on CPUs has heads of {', '.join(map(str, known))} channels, and these have {width}; {OTHERS}"


def _has_kernel(width: int) -> bool:
    """Its list leaves out some widths that it computes, 48 among them: the compiled code knows better."""
    return width in widths() or holds_text("vllm", KERNELS, ATTENTION_KERNEL.format(width=width))


def _attends(config: Any) -> bool:
    return bool(getattr(config, "num_attention_heads", None))


def _scan_refusal(config: Any) -> str | None:
    modules = (modules_by_architecture().get(name) for name in getattr(config, "architectures", None) or ())
    mixed = any(MIXER in text_of("vllm", f"vllm/model_executor/models/{module}.py") for module in modules if module)
    if not mixed or holds_text("vllm", KERNELS, SCAN):
        return None
    return f"vLLM's build for CPUs has no kernel for the scans of {config.model_type} models (Mamba); {OTHERS}"


@cache
def widths() -> tuple[int, ...]:
    """Of the heads that its attention has kernels for, ascending; none where nobody says."""
    functions = (node for node in ast.walk(syntax_of(text_of("vllm", ATTENTION))) if isinstance(node, ast.FunctionDef))
    asked = (function for function in functions if function.name == "get_supported_head_sizes")
    said = (one.value for function in asked for one in function.body if isinstance(one, ast.Return))
    return tuple(sorted({width for value in said if isinstance(value, ast.List) for width in ast.literal_eval(value)}))


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
