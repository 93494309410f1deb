"""Checkpoints that others have quantized, read as integers (or float8), scales and zero points, or as floats.

GPTQ (AutoGPTQ, GPTQModel): `qweight` int32 [columns * bits / 32, rows], `qzeros` int32 [groups, rows * bits / 32], `scales`
[groups, rows] and `g_idx` [columns], the group of each column; the first format stores zero points less one, 'gptq_v2' does not.
AWQ (AutoAWQ, version gemm): the same three with rows packed in the order 0 2 4 6 1 3 5 7. compressed-tensors (llm-compressor):
`weight_packed`, or `weight` in int8 or float8, with `weight_scale`; read by that library. fp8 (DeepSeek, Qwen): `weight` in float8
with `weight_scale_inv`, a scale for each block or one for all. bitsandbytes: bitsandbytes_weights.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint import bitsandbytes_weights, compressed_weights
from featherweight.checkpoint.compressed_weights import ordered, weights_told
from featherweight.checkpoint.packed_layers import Found, Layer, grid_of, modules, one_off, whole, without_scale
from featherweight.errors import CheckpointError, one_line
from featherweight.grid import Grid

if TYPE_CHECKING:
    from torch import Tensor

GPTQ, AWQ, FP8, COMPRESSED = "gptq", "awq", "fp8", "compressed-tensors"
BITSANDBYTES, UNNAMED = bitsandbytes_weights.METHOD, "no quant_method"
"""What is meant by its flags alone, and what is told where nothing says how weights are packed."""
AUTO_ROUND = "auto-round"
PACKED_BY_AUTO_ROUND = {"auto_round:auto_gptq": GPTQ, "auto_round:auto_awq": AWQ}
"""Intel's AutoRound packs as others do, and says so."""
FORMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    GPTQ: (("checkpoint_format", "format"), ("gptq", "gptq_v2")),
    AWQ: (("version", "format", "checkpoint_format"), ("gemm",)),
    COMPRESSED: (("format",), ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized")),
    FP8: (("fmt",), ("e4m3",)),
    BITSANDBYTES: ((), ()),
}
"""The keys of the settings that tell a method's layout, the first that is there, and the layouts that are read."""
SCALES = {
    **dict.fromkeys((GPTQ, AWQ), re.compile(r"\.scales$")),
    COMPRESSED: re.compile(r"\.weight_scale$"),
    FP8: re.compile(r"\.weight_scale_inv$"),
    BITSANDBYTES: re.compile(r"\.(weight\.(absmax|quant_state\..+)|SCB)$"),
}
"""By method: what the numbers of a packed weight are multiplied with, behind its module's name. Another method's is not read."""
BESIDE = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|weight_(packed|scale|scale_inv|shape|zero_point|g_idx)"
    r"|(input|output|activation|[qkv])_(scale|zero_point)"
    rf"|{bitsandbytes_weights.BESIDE})$"
)
"""Tensors that stand for a weight or a rounding at run time, and have no place in a float model."""


def method_of(config: Mapping[str, Any]) -> str | None:
    """How config.json says that the weights are packed; None for float weights."""
    settings = config.get("quantization_config")
    if settings is None:
        return None
    told = settings.get("quant_method") if isinstance(settings, dict) else None
    if told == AUTO_ROUND:
        return PACKED_BY_AUTO_ROUND.get(str(settings.get("packing_format")), AUTO_ROUND)
    by_flag = isinstance(settings, dict) and (settings.get("load_in_8bit") or settings.get("load_in_4bit"))
    return str(told) if told is not None else BITSANDBYTES if by_flag else UNNAMED


def grid_told(method: str, settings: Mapping[str, Any]) -> Grid | None:
    """The grid that the weights keep by what the settings say, before any is read; None where they become floats, or do not say."""
    if method == FP8:
        return None
    if method == BITSANDBYTES:
        return grid_of(("int", 8, None), -127, 127) if bitsandbytes_weights.bits_of(settings) == 8 else None
    if method == COMPRESSED:
        groups = weights_told(settings)
        told = groups[0] if groups else {}
        of_their_own = any(map(ordered, groups))
        symmetric, bits, kind = told.get("symmetric", True) and not of_their_own, told.get("num_bits"), told.get("type", "int")
        size = told.get("group_size") if told.get("strategy") == "group" else None
    else:
        symmetric = (
            settings.get("sym", False) and not settings.get("desc_act")
            if method == GPTQ
            else not settings.get("zero_point", not settings.get("sym", False))
        )
        bits, kind, size = settings.get("bits", 4), "int", settings.get("group_size", 128)
    bits = int(bits or 0)
    low, high = {8: (-128, 127), 4: (-8, 7)}.get(bits, (0, 0))
    return grid_of((str(kind), bits, size if size and size > 0 else None), low, high) if symmetric and high else None


def rounded_when_run(settings: Mapping[str, Any]) -> list[str]:
    """What compressed-tensors' settings have whoever runs the model round besides its weights."""
    groups = settings.get("config_groups") or {}
    activations = any(group.get("input_activations") for group in groups.values())
    return ["activations"] * activations + ["keys and values"] * bool(settings.get("kv_cache_scheme"))


def require_readable(config: Mapping[str, Any], where: str, *, floats: bool = False) -> None:
    """Raise CheckpointError for a format that is not read here, before any weight is. floats: all that the files hold are."""
    method, settings = method_of(config), config["quantization_config"]
    instead = "give the float checkpoint"
    if method == UNNAMED:
        raise CheckpointError(f"{where}: quantization_config names no quant_method; take it out if the weights are floats")
    if method not in READERS and floats:
        raise CheckpointError(
            f"{where}: quantization_config names the quant_method '{method}', and the weights are floats; take it out of "
            "config.json"
        )
    if method not in READERS:
        raise CheckpointError(f"{where}: the weights are quantized already ({method}); known: {', '.join(READERS)}; {instead}")
    known = FORMS[method][1]
    told, form = form_of(method, settings)
    if form is not None and form not in known:
        listed = ", ".join(known)
        raise CheckpointError(f"{where}: {method} weights in the {told} '{form}' are not read here; known: {listed}; {instead}")
    if reason := SETTINGS_REFUSALS.get(method, lambda _: None)(settings):
        raise CheckpointError(f"{where}: {reason}; {instead}")


def form_of(method: str, settings: Mapping[str, Any]) -> tuple[str, str | None]:
    """The key that tells a method's layout, and the layout; None where nothing tells it."""
    told = next((key for key in FORMS[method][0] if settings.get(key) is not None), "")
    return told, str(settings[told]).lower() if told else None


GPTQ_BITS = (2, 3, 4, 8)


def _packed_refusal(method: str, settings: Mapping[str, Any]) -> str | None:
    """Why weights that are packed as the settings of GPTQ or AWQ say are not read; None where they are."""
    bits = settings.get("bits", 4)
    told = {key: settings[key] for key in ("bits", "group_size") if key in settings}
    for key, value in told.items():
        if not isinstance(value, int) or isinstance(value, bool):
            return f"{key} of quantization_config is {value!r}, and must be a whole number"
    if (packed := settings.get("pack_dtype") or "int32") != "int32":
        return f"{method} weights that are packed into {packed} are not read here, into int32 they are"
    by_module = (settings.get("dynamic") or {}) if method == GPTQ else {}
    if not isinstance(by_module, dict) or not all(isinstance(one, dict) for one in by_module.values()):
        return f"dynamic of quantization_config is {by_module!r}, and must have settings for each pattern"
    every = [bits, *(told.get("bits", bits) for name, told in by_module.items() if not name.startswith("-:"))]
    odd = next((one for one in every if one not in ((4,) if method == AWQ else GPTQ_BITS)), None)
    return _other_layer(settings) if odd is None else f"{method} weights of {odd} bits are not read here"


def _other_layer(settings: Mapping[str, Any]) -> str | None:
    """That AutoRound packed some layer otherwise than the others; one of 16 bits is a float."""
    usual = {"bits": settings.get("bits"), "group_size": settings.get("group_size"), "sym": settings.get("sym")}
    for name, told in (settings.get("extra_config") or {}).items():
        if told.get("bits", 0) < 16 and {**usual, **told} | usual != {**usual, **told}:
            return f"weights that AutoRound packed otherwise in some layers (extra_config: {name}) are not read here"
    return None


def _groups_refusal(settings: Mapping[str, Any]) -> str | None:
    """The same for the groups of compressed-tensors' settings."""
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        return "quantization_config has no config_groups, which say how compressed-tensors packed the weights"
    if settings.get("transform_config"):
        return "compressed-tensors weights that activations are to be rotated for (transform_config) are not read here"
    if ((sparse := settings.get("sparsity_config") or {}).get("format") or "dense") != "dense":
        return f"compressed-tensors weights whose zeros are left out (sparsity_config: {sparse['format']}) are not read here"
    wrong = next((name for name, group in groups.items() if not _is_group(group)), None)
    return f"config_groups.{wrong} of quantization_config is none that compressed-tensors writes" if wrong else None


def _is_group(group: Any) -> bool:
    weights = group.get("weights") if isinstance(group, dict) else None
    return isinstance(weights, dict) and isinstance(weights.get("num_bits"), int) and isinstance(group.get("targets"), list)


def _blocks_refusal(settings: Mapping[str, Any]) -> str | None:
    """The same for float8 with a scale a block, or one a matrix."""
    size = settings.get("weight_block_size")
    if size is None and "weight_block_size" in settings:
        return None
    if isinstance(size, list) and len(size) == 2 and all(isinstance(one, int) and one > 0 for one in size):
        return None
    return f"fp8 weights are read here in blocks, and weight_block_size is {size!r}"


def _flags_refusal(settings: Mapping[str, Any]) -> str | None:
    """The same for bitsandbytes."""
    return None if bitsandbytes_weights.bits_of(settings) else "quantization_config says neither load_in_4bit nor load_in_8bit"


SETTINGS_REFUSALS: Mapping[str | None, Callable[[Mapping[str, Any]], str | None]] = {
    GPTQ: partial(_packed_refusal, GPTQ),
    AWQ: partial(_packed_refusal, AWQ),
    COMPRESSED: _groups_refusal,
    FP8: _blocks_refusal,
    BITSANDBYTES: _flags_refusal,
}
"""What else of the settings must be as a method writes them."""
PARTS: dict[str | None, tuple[str, ...]] = {
    GPTQ: (".qweight",),
    AWQ: (".qweight",),
    COMPRESSED: (".weight_scale",),
    FP8: (".weight_scale_inv",),
    BITSANDBYTES: bitsandbytes_weights.PARTS,
}
"""What the name of one tensor of each packed weight ends in."""


def require_packed(config: Mapping[str, Any], header: Mapping[str, Mapping[str, Any]], where: str) -> None:
    """Raise CheckpointError where the tensors' names, types and shapes in the `header` are not those that config.json's word on
    packing makes one expect.
    """
    method, given = method_of(config), list(header)
    if method is not None and (bare := without_scale(header, SCALES[method])) is not None:
        raise CheckpointError(f"{where}: {bare} is packed ({method}), and the scale of its numbers is missing; copy it again")
    if method is not None and (bare := _without_zeros(method, config["quantization_config"], header)) is not None:
        raise CheckpointError(f"{where}: {bare} is packed ({method}), and its zero points (qzeros) are missing; copy it again")
    if method is not None and not any(name.endswith(PARTS[method]) for name in given):
        raise CheckpointError(
            f"{where}: config.json says that the weights are packed ({method}), and no tensor is (*{PARTS[method][0]}); "
            "take quantization_config out of it if the weights are floats"
        )
    packed = next((name for name in given if method is None and name.endswith((".qweight", ".weight_packed"))), None)
    if packed:
        raise CheckpointError(
            f"{where}: {packed} is a packed weight, and config.json has no quantization_config that says how it is to be read; "
            "put it there (AutoGPTQ left it in quantize_config.json), or give the float checkpoint"
        )


def _without_zeros(method: str, settings: Mapping[str, Any], given: Collection[str]) -> str | None:
    """The first weight of GPTQ or AWQ that lacks its zero points; an AWQ that says it has none may."""
    symmetric = method == AWQ and settings.get("zero_point") is False
    if method not in (GPTQ, AWQ) or symmetric:
        return None
    return next((f"{module}.qweight" for module in modules(given, ".qweight") if f"{module}.qzeros" not in given), None)


def read(config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> Found:
    """The quantized parameters among `tensors`; raises CheckpointError where a part of one is missing or misshapen."""
    method, settings = str(method_of(config)), config["quantization_config"]
    try:
        found = READERS[method](settings, tensors)
    except (KeyError, RuntimeError, ValueError, IndexError) as error:
        reason = f"{error.args[0]} is missing" if type(error) is KeyError else one_line(error, 200)
        raise CheckpointError(f"{where}: the quantized weights cannot be unpacked ({reason}); copy it again") from error
    off = one_off(found.layers.values()) if method == GPTQ else 0
    if off:
        other = "gptq_v2" if off < 0 else "gptq"
        raise CheckpointError(
            f"{where}: the weights lie one step off zero, so that their zero points are stored as {other} stores them, whatever "
            f"quantization_config says; say checkpoint_format: {other} there"
        )
    return found


def _gptq(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Found:
    found = Found()
    first = form_of(GPTQ, settings)[1] != "gptq_v2"
    for module in modules(tensors, ".qweight"):
        told = {**settings, **override(settings, module)}
        bits = told.get("bits", 4)
        scales = tensors[f"{module}.scales"].T.float().contiguous()
        q = _numbers(tensors[f"{module}.qweight"], bits).T.contiguous()
        if told.get("desc_act") and f"{module}.g_idx" not in tensors:
            raise KeyError(f"{module}.g_idx")
        zeros = _zero_points(tensors[f"{module}.qzeros"], bits, first)
        layer = Layer(bits, q, scales, _group(told, q), zeros, tensors.get(f"{module}.g_idx"))
        found.layers[f"{module}.weight"] = whole(layer, module)
    return found


def override(settings: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """What `dynamic` says otherwise of a module: the first pattern that its name begins with, as gptqmodel takes it."""
    for pattern, told in (settings.get("dynamic") or {}).items():
        if re.match(pattern.removeprefix("+:").removeprefix("-:"), module):
            return {} if pattern.startswith("-:") else told
    return {}


def _zero_points(words: Tensor, bits: int, first: bool) -> Tensor:
    """[rows, groups] about zero, of words [groups, rows * bits / 32]; the `first` format has them less one.

    Where numbers fill a word, 1 is added to words: it carries into the next number where one was less than zero, as in gptqmodel,
    which took it off so.
    """
    if 32 % bits:
        points = _numbers(words.T, bits)
        half = 1 << bits - 1
        return (points + half + first) % (2 * half) - half
    return _numbers((words + first * sum(1 << place for place in range(0, 32, bits))).T, bits)


def _numbers(words: Tensor, bits: int) -> Tensor:
    """int32 [n, m], of whose bits the numbers take one after another down the words -> int8 about zero, [n * 32 / bits, m]."""
    import torch

    words = words.to(torch.int64) & 0xFFFFFFFF
    runs = words.reshape(-1, bits, words.shape[1])
    rows = []
    for place in range(0, 32 * bits, bits):
        word, shift = divmod(place, 32)
        number = runs[:, word] >> shift
        if shift + bits > 32:
            number = number | runs[:, word + 1] << 32 - shift
        rows.append(((number & (1 << bits) - 1) - (1 << bits - 1)).to(torch.int8))
    return torch.stack(rows, dim=1).reshape(-1, words.shape[1])


def _awq(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Found:
    from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter

    found = Found()
    for module in modules(tensors, ".qweight"):
        packed, zeros = tensors[f"{module}.qweight"], tensors.get(f"{module}.qzeros")
        if zeros is not None and zeros.shape[1:] != packed.shape[1:]:
            raise ValueError(f"{module} has zero points {list(zeros.shape)} of numbers {list(packed.shape)}")
        halves = AutoAWQConverter.reverse_awq_order(*AutoAWQConverter.unpack_awq(packed, zeros, 4), 4)
        q, about = _about_zero(halves[0]), None if halves[1] is None else _about_zero(halves[1])
        scales = tensors[f"{module}.scales"].T.float().contiguous()
        found.layers[f"{module}.weight"] = whole(Layer(4, q, scales, _group(settings, q), about), module)
    return found


def _fp8(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Found:
    """float8 [rows, columns] times the scale of its block, [blocks of rows, blocks of columns], or of all of it.

    Where blocks do not divide a matrix transformers takes smaller ones than the format says, so that such are not read.
    """
    found, size = Found(), settings.get("weight_block_size")
    for module in modules(tensors, ".weight_scale_inv"):
        weight, scales = tensors[f"{module}.weight"], _multiples(tensors[f"{module}.weight_scale_inv"])
        if not weight.is_floating_point():
            raise ValueError(f"{module}.weight has scales of float8, and is {weight.dtype}")
        (rows, columns), (high, wide) = weight.shape, size or weight.shape
        high_here, wide_here = min(high, rows), min(wide, columns)
        if (tuple(scales.shape) if size else (scales.numel(), 1)) != (rows / high_here, columns / wide_here):
            told = f"{module} of {rows} times {columns} has scales {list(scales.shape)}"
            raise ValueError(f"{told}, which blocks of {high} times {wide} that divide it do not have")
        spread = scales.repeat_interleave(high_here, 0).repeat_interleave(wide_here, 1) if size else scales
        found.floats[f"{module}.weight"] = weight.float() * spread
    return found


def _multiples(scales: Tensor) -> Tensor:
    """Scales in float32; bytes are exponents of 2 (E8M0), as MXFP8 stores them."""
    import torch

    return (scales.float() - 127).exp2() if scales.dtype == torch.uint8 else scales.float()


def _about_zero(halves: Tensor) -> Tensor:
    """int8 [columns, rows], of which the low 4 bits count -> [rows, columns] in -8 to 7."""
    return ((halves & 15) - 8).T.contiguous()


def _group(settings: Mapping[str, Any], q: Tensor) -> int:
    """Columns per scale; -1 in the settings means all of a row."""
    size = settings.get("group_size", 128)
    return size if size > 0 else q.shape[1]


READERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Tensor]], Found]] = {
    GPTQ: _gptq,
    AWQ: _awq,
    COMPRESSED: compressed_weights.read,
    FP8: _fp8,
    BITSANDBYTES: bitsandbytes_weights.read,
}
