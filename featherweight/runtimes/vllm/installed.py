"""What the installed vLLM says of itself in its own files: to import it takes ten seconds.

Everything is empty where its toolchain is not installed.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache

from featherweight.system.syntax import syntax_of
from featherweight.system.toolchains import holds_text, text_of

ATTENTION, REGISTRY = "vllm/v1/attention/backends/cpu_attn.py", "vllm/model_executor/models/registry.py"
LATENT_ATTENTION = "vllm/v1/attention/backends/mla/cpu_mla.py"
"""Of keys that are kept compressed (multi-head latent attention): it has kernels for widths of its own."""
LATENT_TYPES = ("vllm/transformers_utils/model_arch_config_convertor.py", "is_deepseek_mla")
"""The function that names the model types whose keys its own modules keep so."""
TABLES = ("_TEXT_GENERATION_MODELS", "_TRANSFORMERS_SUPPORTED_MODELS")
"""Where its registry names the decoders of text that it serves, with modules of its own or with transformers'."""
KERNELS = "vllm/_C*.so"
"""Its compiled code, a file for each set of a CPU's instructions."""
ATTENTION_KERNEL = "13AttentionImplILNS_3ISAE1EfLl{width}E"
"""What that calls the attention that every CPU computes, in float32, over heads of a width."""


def has_attention_kernel(width: int) -> bool:
    """Whether it computes heads of a width in float32. Its list leaves out some, 48 among them: the compiled code knows better."""
    return holds_text("vllm", KERNELS, ATTENTION_KERNEL.format(width=width))


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
