"""Writing quantized weights for vLLM: a Hugging Face folder in compressed-tensors' formats, without a second rounding.

The names, shapes and configuration are those that llm-compressor writes (the tests compare).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.streamed import Change
from featherweight.checkpoint.tensors import saving
from featherweight.grid import Grid
from featherweight.model.quantized_weights import QuantizedWeights
from featherweight.runtimes.vllm.schemes import Scheme
from featherweight.store.mapped import give_back
from featherweight.store.tensor_file import Kind, write_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

FLOAT8_MAX = 448.0
INT32_BITS = 32


def fused_refusal(rows: Mapping[str, tuple[Grid, int]], scheme: Scheme) -> str | None:
    """Why a matrix is not served: on a grid that `scheme` does not hold, on another than the rest, or with a short last group.

    rows: grid and columns of each matrix in the blocks.

    vLLM fuses q, k and v, and gate and up, so that several grids in a model would meet in one matrix.
    """
    shared = next((grid for grid, _ in rows.values()), None)
    for name, (grid, columns) in rows.items():
        if grid != shared or not scheme.holds(grid):
            return f"vLLM's {scheme.name} holds {scheme.weights}, all on one grid, and {name} lies on {grid.name}"
        if grid.group_size and columns % grid.group_size:
            return (
                f"vLLM wants groups that divide a row: {name} has {columns} columns, and {grid.name} groups of {grid.group_size}; "
                "take a grid of smaller groups, or one scale per row"
            )
    return None


def pack(
    model: PreTrainedModel,
    quantized: QuantizedWeights | None,
    checkpoint: Path,
    out: Path,
    scheme: Scheme | None,
    cache_scales: Mapping[str, float] | None = None,
    floats: str = "float32",
    change: Change | None = None,
) -> None:
    """Write configuration and weights to `out`, one by one: the integers and scales of Linear layers, all else in `floats`.

    vLLM keeps embedding and output head in float; where they are quantized theirs are the float values on the grid, which
    `model` already holds, or `change` makes of what it holds. cache_scales: what keys and values are divided by before they are
    kept in fp8, by parameter name.
    """
    import torch

    linear = _linear(quantized) if quantized else {}
    kind = getattr(torch, floats)
    kinds: dict[str, Kind] = {}
    made: dict[str, Callable[[], Tensor]] = {}
    for name, value in _once(model).items():
        if quantized and scheme and name in linear:
            kinds |= _packed_kinds(name, quantized, scheme)
            made |= {part: partial(_packed, name, part, quantized, scheme) for part in _packed_kinds(name, quantized, scheme)}
        else:
            kinds[name] = (kind if value.is_floating_point() else value.dtype, tuple(value.shape))
            made[name] = partial(_float, name, value, kinds[name][0], change)
    for name, scale in (cache_scales or {}).items():
        kinds[name], made[name] = (torch.float32, (1,)), partial(torch.tensor, [scale])
    with saving(out):
        write_tensors(out / "model.safetensors", kinds, ((name, make()) for name, make in made.items()))
    grid = next(iter(linear.values()), None)
    described = quantization_config(scheme, grid, _float_layers(model, set(linear)), cache=bool(cache_scales))
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"dtype": floats, "quantization_config": described}
    (out / "config.json").write_text(json.dumps(config, indent=2))


def _linear(quantized: QuantizedWeights) -> dict[str, Grid]:
    """The grids of the weights that vLLM serves quantized."""
    return quantized.body


def _float(name: str, value: Tensor, kind: torch.dtype, change: Change | None) -> Tensor:
    changed = (change(name, value) if change else value).to(kind).contiguous()
    give_back(value)
    return changed


def _packed_kinds(name: str, quantized: QuantizedWeights, scheme: Scheme) -> dict[str, Kind]:
    """Type and shape of the tensors that stand for one weight."""
    import torch

    q, scale = quantized.q[name], {f"{name}_scale": (torch.float32, tuple(quantized.scales[name].shape))}
    if scheme.format != "pack-quantized":
        return {name: (q.dtype, tuple(q.shape)), **scale}
    words = -(-q.shape[1] * scheme.bits // INT32_BITS)
    return {f"{name}_packed": (torch.int32, (q.shape[0], words)), f"{name}_shape": (torch.int64, (2,)), **scale}


def _packed(name: str, part: str, quantized: QuantizedWeights, scheme: Scheme) -> Tensor:
    """One of them."""
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    q = quantized.q[name].contiguous()
    if part == f"{name}_scale":
        return quantized.scales[name].float().contiguous()
    if part == f"{name}_shape":
        return torch.tensor(q.shape)
    return pack_to_int32(q, scheme.bits).contiguous() if part == f"{name}_packed" else q


def quantization_config(scheme: Scheme | None, grid: Grid | None, ignored: list[str], cache: bool) -> dict[str, Any]:
    """compressed-tensors' description of weights on `grid` in `scheme`, and of an fp8 cache; both symmetric."""
    groups = {}
    if scheme and grid:
        strategy = {"strategy": "group" if grid.group_size else "channel", "group_size": grid.group_size}
        rounded = _numbers(8, scheme.kind) | {"strategy": "token", "dynamic": True}
        groups["group_0"] = {
            "targets": ["Linear"],
            "weights": _numbers(grid.bits, grid.kind) | strategy | {"dynamic": False},
            "input_activations": None if scheme.activations == "float" else rounded,
            "format": scheme.format,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": scheme.format if scheme else "dense",
        "quantization_status": "compressed",
        "config_groups": groups,
        "kv_cache_scheme": _numbers(8, "float") | {"strategy": "tensor", "dynamic": False} if cache else None,
        "ignore": ignored,
    }


def _numbers(bits: int, kind: str) -> dict[str, Any]:
    return {"num_bits": bits, "type": kind, "symmetric": True}


def cache_scales(model: PreTrainedModel, windows: list[list[int]]) -> dict[str, float]:
    """One scale for the keys and one for the values of each layer, by the names that vLLM reads them under.

    The largest key or value of the windows of token ids (positions included, as the cache holds them) becomes fp8's largest number.
    """
    import torch

    scales: dict[str, float] = {}
    for ids in windows:
        with torch.inference_mode():
            cache = model(torch.tensor([ids], device=model.device), use_cache=True).past_key_values
        for index, layer in enumerate(cache.layers):
            for kind, values in (("k", layer.keys), ("v", layer.values)):
                name = f"model.layers.{index}.self_attn.{kind}_scale"
                scales[name] = max(scales.get(name, 0.0), values.abs().max().item() / FLOAT8_MAX)
    return scales


def _once(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state of `model`, without the second name of tied weights."""
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in model.state_dict().items():
        if value.data_ptr() not in seen:
            seen.add(value.data_ptr())
            state[name] = value
    return state


def _float_layers(model: PreTrainedModel, quantized: set[str]) -> list[str]:
    from torch import nn

    modules = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return [name for name in modules if f"{name}.weight" not in quantized]
