"""Which widths of attention heads vLLM has kernels for on CPUs, read from its source: importing it takes ten seconds."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

from featherweight.errors import ToolchainError
from featherweight.system.toolchains import python

SOURCE = "lib/python*/site-packages/vllm/v1/attention/backends/cpu_attn.py"
ASKED = "get_supported_head_sizes"


@cache
def widths_on_cpus() -> frozenset[int]:
    """What its attention for CPUs says of itself; nothing where the toolchain is not installed, or says it otherwise."""
    try:
        environment: Path = python("vllm").parent.parent
    except ToolchainError:
        return frozenset()
    functions = (node for path in environment.glob(SOURCE) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    said = [node for node in functions if isinstance(node, ast.FunctionDef) and node.name == ASKED]
    returned = [statement.value for function in said for statement in function.body if isinstance(statement, ast.Return)]
    lists = [ast.literal_eval(value) for value in returned if isinstance(value, ast.List)]
    return frozenset(width for widths in lists for width in widths)


def refusal(width: int | None) -> str | None:
    """Why heads of `width` channels are not served from a CPU; None where they are, or where nobody tells."""
    known = widths_on_cpus()
    if not known or width is None or width in known:
        return None
    return (
        f"vLLM's attention on CPUs has heads of {', '.join(map(str, sorted(known)))} channels, and these have {width}; "
        "take another engine"
    )
