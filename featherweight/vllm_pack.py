"""Writing W8A8 weights for vLLM: a Hugging Face folder in compressed-tensors' int-quantized format, without a second rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.quantized import HEADS, QuantizedWeights

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


def pack(model: PreTrainedModel, quantized: QuantizedWeights, checkpoint: Path, out: Path) -> None:
    """Write configuration and weights to `out`: int8 with a scale per row for Linear layers, all else in float32.

    vLLM keeps embedding and output head in float; theirs are the float values on the grid, which `model` already holds.
    Activations are rounded to int8 per token at run time.
    """
    from safetensors.torch import save_file

    linear = {name for name in quantized.q if not name.endswith(HEADS)}
    tensors: dict[str, Tensor] = {}
    for name, value in _once(model).items():
        if name in linear:
            tensors[name] = quantized.q[name].contiguous()
            tensors[f"{name}_scale"] = quantized.scales[name].float().contiguous()
        else:
            tensors[name] = value.contiguous()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"dtype": "float32", "quantization_config": quantization_config(_float_layers(model, linear))}
    (out / "config.json").write_text(json.dumps(config, indent=2))


def quantization_config(ignored: list[str]) -> dict[str, Any]:
    """compressed-tensors' description of W8A8: symmetric int8, per row for weights, per token for activations."""
    int8 = {"num_bits": 8, "type": "int", "symmetric": True}
    weights = int8 | {"strategy": "channel", "dynamic": False}
    activations = int8 | {"strategy": "token", "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}},
        "ignore": ignored,
    }


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
