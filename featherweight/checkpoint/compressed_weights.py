"""Weights of compressed-tensors (llm-compressor), as that library reads them: `weight_packed`, or `weight` in int8 or float8."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.packed_layers import Found, Layer, modules, whole

if TYPE_CHECKING:
    from torch import Tensor


def read(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Found:
    """Every weight with a scale."""
    from compressed_tensors.quantization import QuantizationConfig

    plain = {name: without_order(group) for name, group in settings["config_groups"].items()}
    groups: Any = QuantizationConfig.model_validate({**settings, "config_groups": plain}).config_groups.values()
    schemes = {target: scheme for scheme in groups for target in scheme.targets}
    found = Found()
    for module in modules(tensors, ".weight_scale"):
        scheme = schemes.get(_target(schemes, module))
        if scheme is None:
            raise KeyError(f"no config group has {module} as a target")
        name, args = f"{module}.weight", scheme.weights
        if args.type == "float" and args.strategy not in ("tensor", "channel"):
            found.floats[name] = _decompressed(str(scheme.format or settings["format"]), scheme, tensors, module)
        else:
            found.layers[name] = _layer(args, tensors, module)
    return found


def weights_told(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What each config group says of weights, where it says something."""
    return [group["weights"] for group in settings.get("config_groups", {}).values() if group.get("weights")]


def ordered(weights: Mapping[str, Any]) -> bool:
    """Whether columns are in groups of their own order, which `weight_g_idx` tells; compressed-tensors 0.19 knows that no more."""
    told = weights.get("actorder")
    return told is True or str(told).lower() in ("group", "dynamic")


def without_order(group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a group as that library takes them."""
    weights = group.get("weights") or {}
    return {**group, "weights": weights | {"actorder": None}} if ordered(weights) else dict(group)


def _target(targets: Iterable[str], module: str) -> str:
    """The target that says how a module is packed: its name before a pattern before its class, as the library has it."""
    from compressed_tensors.utils.match import match_name

    by_name = sorted(targets, key=lambda target: (target.startswith("re:"), target))
    return next((target for target in by_name if match_name(module, target)), "Linear")


def _layer(args: Any, tensors: Mapping[str, Tensor], module: str) -> Layer:
    """One layer of compressed-tensors in integers, packed or not, or in float8."""
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    packed, zeros = tensors.get(f"{module}.weight_packed"), tensors.get(f"{module}.weight_zero_point")
    shape = tensors[f"{module}.weight"].shape if packed is None else torch.Size(tensors[f"{module}.weight_shape"].tolist())
    q = tensors[f"{module}.weight"] if packed is None else unpack_from_int32(packed, args.num_bits, shape)
    scales = tensors[f"{module}.weight_scale"].float()
    if zeros is None and not args.symmetric:
        raise KeyError(f"{module}.weight_zero_point")
    if args.strategy not in ("tensor", "channel", "group"):
        raise ValueError(f"{module}: integers with one scale per {args.strategy} are not read here")
    scales = scales.reshape(1, 1).expand(shape[0], 1) if scales.numel() == 1 else scales.reshape(shape[0], -1)
    if zeros is not None and zeros.dtype == torch.int32:
        zeros = unpack_from_int32(zeros, args.num_bits, scales.shape, packed_dim=0)
    zeros = None if zeros is None else zeros.reshape(-1, scales.shape[1]).expand(scales.shape)
    layer = Layer(args.num_bits, q, scales, args.group_size or shape[1], zeros, tensors.get(f"{module}.weight_g_idx"))
    return layer if scales.shape[1] == 1 and not args.group_size else whole(layer, module)


def _decompressed(form: str, scheme: Any, tensors: Mapping[str, Tensor], module: str) -> Tensor:
    """A layer in float8 with other scales than a row's, as the library reads it, in float32."""
    from compressed_tensors.compressors import BaseCompressor

    parts = {name: tensors[f"{module}.{name}"] for name in ("weight", "weight_scale")}
    parts["weight_scale"] = parts["weight_scale"].float()
    return BaseCompressor.get_value_from_registry(form).decompress(parts, scheme)["weight"].float()
