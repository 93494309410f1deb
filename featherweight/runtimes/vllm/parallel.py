"""Tensor parallelism: every matrix of a layer cut into as many parts as there are GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from featherweight.grid import Grid
from featherweight.system.machine import Machine


def machine_refusal(size: int, machine: Machine) -> str | None:
    """Why a machine does not hold that many parts, a GPU each."""
    if size == 1 or size <= len(machine.gpus):
        return None
    there = f"there {'is' if len(machine.gpus) == 1 else 'are'} {len(machine.gpus) or 'none'}"
    return f"tensor_parallel_size {size} wants as many GPUs, and {there}; take a smaller one"


def model_refusal(size: int, config: Any) -> str | None:
    """Why a model cannot be cut so: vLLM wants whole heads in every part, and a part of the inner channels.

    Heads of keys and values are repeated where they are fewer than the parts (vLLM 0.32, config/model.py and models/llama.py).
    """
    if size == 1:
        return None
    config = config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % size:
        return f"tensor_parallel_size {size} does not divide {heads} attention heads"
    if max(kv_heads, size) % min(kv_heads, size):
        return f"tensor_parallel_size {size} neither divides {kv_heads} key-value heads nor is a multiple of them"
    inner = getattr(config, "intermediate_size", None)
    return f"tensor_parallel_size {size} does not divide {inner} inner channels" if inner and inner % size else None


def groups_refusal(size: int, rows: Mapping[str, tuple[Grid, int]]) -> str | None:
    """Why groups of weights are cut apart: matrices that give back to the residual stream are cut along their columns.

    rows: grid and columns of each matrix.
    """
    for name, (grid, columns) in rows.items():
        if size > 1 and grid.group_size and _cut_by_columns(name) and (columns // size) % grid.group_size:
            return f"tensor_parallel_size {size} cuts {name}'s groups of {grid.group_size} weights apart; take one scale per row"
    return None


def _cut_by_columns(name: str) -> bool:
    """Whether a matrix gives back to the residual stream, by the names of the families that vLLM serves."""
    return any(part in name for part in ("o_proj", "down_proj", "out_proj", "fc2", "c_proj", "dense_4h_to_h"))
