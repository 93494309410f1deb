"""The shapes of packed weights, told by headers: whether their parts are of one matrix, and which matrix that is.

How the parts lie stands in quantized_formats.py. What only values tell (the shape of a bitsandbytes weight of 4 bits, the group of
each column) is left for loading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from featherweight.checkpoint.compressed_weights import ordered, weights_told
from featherweight.checkpoint.quantized_formats import (
    AWQ,
    BESIDE,
    BITSANDBYTES,
    COMPRESSED,
    FP8,
    GPTQ,
    SCALES,
    method_of,
    override,
)
from featherweight.errors import CheckpointError

Shape = tuple[int, ...]
Header = Mapping[str, Mapping[str, Any]]
WORD = 32
"""Bits of what numbers are packed into."""
PACKED: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys((GPTQ, AWQ), ("qweight",)),
    **dict.fromkeys((FP8, BITSANDBYTES), ("weight",)),
    COMPRESSED: ("weight", "weight_packed"),
}
"""What the numbers of a weight are called, behind its module's name."""


@dataclass(frozen=True)
class Module:
    """The parts of one packed weight: what stands behind the module's name, and the shape of each."""

    name: str
    parts: Mapping[str, Shape]


Reader = Callable[[Mapping[str, Any], Module, str], Shape | None]


def require_whole(config: Mapping[str, Any], header: Header, where: str) -> None:
    """Raise CheckpointError, which names `where`, for scales of no packed weight, and for parts that are not of one matrix by what
    config.json says of the packing.
    """
    method = method_of(config)
    if method is None or method not in READERS:
        return
    _require_scaled(method, header, where)
    for name, entry in header.items():
        if str(entry.get("dtype")).startswith("F8") and not name.endswith(".weight") and not BESIDE.search(name):
            raise CheckpointError(
                f"{where}: {name} is packed ({method}) in a form that is not read here; give the float checkpoint"
            )
    unpacked_shapes(config, {name: tuple(entry["shape"]) for name, entry in header.items()}, where)


def unpacked_shapes(config: Mapping[str, Any], shapes: Mapping[str, Shape], where: str) -> dict[str, Shape] | None:
    """The shape of each tensor once the weights are unpacked, by its name; None where headers do not tell."""
    method, settings = str(method_of(config)), config["quantization_config"]
    read = READERS.get(method)
    packed = {} if read is None else {one.name: _shape(read, settings, one, where) for one in _modules(shapes, method)}
    if read is None or not all(packed.values()):
        return None
    plain = {name: shape for name, shape in shapes.items() if not BESIDE.search(name)}
    return plain | {f"{module}.weight": shape for module, shape in packed.items() if shape}


def _shape(read: Reader, settings: Mapping[str, Any], module: Module, where: str) -> Shape | None:
    try:
        return read(settings, module, where)
    except (KeyError, ValueError, TypeError, ZeroDivisionError) as error:
        told = ", ".join(f"{part} {list(shape)}" for part, shape in sorted(module.parts.items()))
        raise CheckpointError(f"{where}: {module.name} has {told}, which are no packed matrix; copy it again") from error


def _require_scaled(method: str, header: Header, where: str) -> None:
    """Refuse scales beside no packed weight, such as AutoAWQ's of activations: they would be left out."""
    scale = SCALES[method]
    for name in header:
        module = scale.sub("", name)
        if module != name and not any(f"{module}.{part}" in header for part in PACKED[method]):
            raise CheckpointError(
                f"{where}: {name} scales no weight but what a module makes ({method}), which is not read here; give the float "
                "checkpoint"
            )


def _modules(shapes: Mapping[str, Shape], method: str) -> Iterator[Module]:
    scale = SCALES[method]
    parts: dict[str, dict[str, Shape]] = {scale.sub("", name): {} for name in sorted(shapes) if scale.search(name)}
    for name, shape in shapes.items():
        module, _, part = name.rpartition(".")
        if module in parts:
            parts[module][part] = shape
    for name, found in parts.items():
        yield Module(name, found)


def _require(module: Module, where: str, wanted: Mapping[str, Shape], told: str) -> None:
    """Refuse a part of another shape."""
    for part, shape in wanted.items():
        if part in module.parts and module.parts[part] != shape:
            raise CheckpointError(
                f"{where}: {module.name}.{part} has shape {list(module.parts[part])}, and {told} ask for {list(shape)}; "
                "the settings are another checkpoint's, or it is damaged: copy it again"
            )


def _gptq(settings: Mapping[str, Any], module: Module, where: str) -> Shape | None:
    told = {**settings, **override(settings, module.name)}
    bits, size = told.get("bits", 4), told.get("group_size", 128)
    (words, rows), columns = module.parts["qweight"], module.parts["qweight"][0] * WORD // bits
    groups = -(-columns // size) if size > 0 else 1
    wanted = {"scales": (groups, rows), "qzeros": (groups, rows * bits // WORD), "g_idx": (columns,)}
    if told.get("desc_act") and "g_idx" not in module.parts:
        raise CheckpointError(f"{where}: {module.name}.g_idx is missing, the groups of its columns (desc_act); copy it again")
    if words * WORD % bits:
        wanted = {"qweight": (-(-words // bits) * bits, rows)}
    _require(module, where, wanted, f"{bits} bits in groups of {size} of {rows} times {columns}")
    return rows, columns


def _awq(settings: Mapping[str, Any], module: Module, where: str) -> Shape | None:
    size = settings.get("group_size", 128)
    columns, words = module.parts["qweight"]
    rows, groups = words * 8, -(-columns // size) if size > 0 else 1
    wanted = {"scales": (groups, rows), "qzeros": (groups, words)}
    _require(module, where, wanted, f"4 bits in groups of {size} of {rows} times {columns}")
    return rows, columns


def _fp8(settings: Mapping[str, Any], module: Module, where: str) -> Shape | None:
    size, shape = settings.get("weight_block_size"), module.parts["weight"]
    if len(shape) != 2:
        raise CheckpointError(
            f"{where}: {module.name}.weight has shape {list(shape)}, and fp8 is read of matrices alone; give the float checkpoint"
        )
    if size:
        high, wide = (min(block, whole) for block, whole in zip(size, shape, strict=True))
        if shape[0] % high or shape[1] % wide:
            raise CheckpointError(
                f"{where}: {module.name}.weight has shape {list(shape)}, which blocks of {high} times {wide} do not divide; "
                "transformers takes other blocks than the format says: give the float checkpoint"
            )
        blocks = (shape[0] // high, shape[1] // wide)
        _require(module, where, {"weight_scale_inv": blocks}, f"blocks of {size[0]} times {size[1]} of {list(shape)}")
    elif prod(module.parts["weight_scale_inv"]) != 1:
        _require(module, where, {"weight_scale_inv": ()}, "settings without weight_block_size")
    return shape


def _rows_of_bitsandbytes(settings: Mapping[str, Any], module: Module, where: str) -> Shape | None:
    if "SCB" not in module.parts:
        return None
    shape = module.parts["weight"]
    _require(module, where, {"SCB": shape[:1]}, f"8 bits of {list(shape)}")
    return shape


def _compressed(settings: Mapping[str, Any], module: Module, where: str) -> Shape | None:
    """Of packed ones the columns are told by the groups, where all weights are packed alike; the scales are of rows or blocks."""
    groups = weights_told(settings)
    told = groups[0] if len(groups) == 1 else {}  # what they say of all weights alike
    lost = {"weight_zero_point": told.get("symmetric") is False, "weight_g_idx": ordered(told)}
    if part := next((part for part, asked in lost.items() if asked and part not in module.parts), None):
        raise CheckpointError(f"{where}: {module.name}.{part} is missing, which the settings ask for; copy it again")
    shape = module.parts.get("weight") or _packed_shape(told, module, where)
    if shape is None:
        return None
    scales, strategy = module.parts["weight_scale"], told.get("strategy")
    wanted = {"channel": (shape[0], 1), "tensor": (1,)}.get(str(strategy))
    if strategy == "group":
        wanted = (shape[0], -(-shape[1] // int(told["group_size"])))
    if wanted and prod(scales) not in (1, prod(wanted)):
        _require(module, where, {"weight_scale": wanted}, f"settings of one scale a {strategy} of {list(shape)}")
    return shape


def _packed_shape(told: Mapping[str, Any], module: Module, where: str) -> Shape | None:
    packed, bits = module.parts.get("weight_packed"), told.get("num_bits")
    if packed is None or not isinstance(bits, int):
        return None
    (rows, _), scales, columns = packed, module.parts["weight_scale"], packed[1] * WORD // bits
    if told.get("strategy") == "group" and len(scales) == 2:
        columns = scales[1] * int(told["group_size"])
        wanted = (rows, -(-columns * bits // WORD))
        _require(module, where, {"weight_packed": wanted}, f"{bits} bits in {scales[1]} groups of {told['group_size']}")
    return rows, columns


READERS: Mapping[str, Reader] = {
    GPTQ: _gptq,
    AWQ: _awq,
    FP8: _fp8,
    BITSANDBYTES: _rows_of_bitsandbytes,
    COMPRESSED: _compressed,
}
