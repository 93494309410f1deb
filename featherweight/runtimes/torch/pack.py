"""Quantized models for PyTorch's own engines: any transformers model, its Linear layers replaced by torch's or torchao's.

The folder holds the integers (see featherweight/runtimes/torch/storage.py); the layers are rebuilt around them when it is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.checkpoint.opening import load_config
from featherweight.errors import IntegrityError
from featherweight.model.architecture import attention_options, auto_class
from featherweight.model.matrices import ends, matrices
from featherweight.runtimes.torch.formats import FORMATS, Format
from featherweight.runtimes.torch.storage import Packed
from featherweight.system.device import CPU, Device, torch_device

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from featherweight.model.quantized_weights import QuantizedWeights
    from featherweight.runtimes.torch.linear import InputRange

RANGE = ".input_range"


def write(model: PreTrainedModel, quantized: QuantizedWeights, ranges: Mapping[str, InputRange], out: Path) -> None:
    """Write `quantized`, the ranges of inputs by the path of their layer, and all that `model` has besides, to `out`."""
    seen = {id(parameter) for name, parameter, _ in matrices(model) if name in quantized.q}
    rest = {path + RANGE: here.stored() for path, here in ranges.items()}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            rest[name] = tensor.detach()
    Packed(quantized, rest).write(out)


def ranges(folder: Path) -> dict[str, InputRange]:
    """The ranges of inputs in `folder`, by the path of their layer; none where they are found token by token."""
    from featherweight.runtimes.torch.linear import InputRange

    stored = Packed.read(folder).rest
    return {name.removesuffix(RANGE): InputRange.of(value) for name, value in stored.items() if name.endswith(RANGE)}


def load(folder: Path, engine: str, device: Device = CPU) -> PreTrainedModel:
    """The model in `folder`, its quantized layers as `engine` makes them; raises IntegrityError where a tensor is missing.

    Tensors are moved to `device` before layers are made of them: torchao's own tensors are made there, and never moved.
    """
    packed, model = Packed.read(folder).to(torch_device(device)), skeleton(folder)
    kind = FORMATS[engine]
    weights = {id(parameter): name for name, parameter, _ in matrices(model) if name in packed.quantized.q}
    identities = {name: id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    state = dict(packed.rest)
    if not kind.vocabulary:
        for identity in ends(model) & weights.keys():
            name = weights.pop(identity)
            state[name] = packed.quantized.dequantize(name)
    # transformers cannot tie what is no parameter any more, so all names of a tensor are given it here.
    given = {identities[name]: tensor for name, tensor in state.items() if name in identities}
    state |= {name: given[identity] for name, identity in identities.items() if identity in given}
    _replace(model, weights, Packed(packed.quantized, state), kind)
    model.load_state_dict(state, strict=False, assign=True)
    _move_buffers(model, torch_device(device))
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise IntegrityError(f"{folder} lacks tensor {missing[0]}; export the variant again")
    return model.eval()


def _move_buffers(model: PreTrainedModel, where: torch.device) -> None:
    """What is computed as a model is made, such as the frequencies of rotary positions."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(where))


def skeleton(folder: Path) -> PreTrainedModel:
    """The architecture that config.json names, float32, its parameters without memory."""
    import torch
    from accelerate import init_empty_weights

    config = load_config(folder)
    with init_empty_weights(include_buffers=False):
        model = auto_class(config).from_config(config, dtype=torch.float32, **attention_options(config))
    model.tie_weights()
    return model


def _replace(model: PreTrainedModel, weights: Mapping[int, str], packed: Packed, kind: Format) -> None:
    """Put quantized layers in the place of all modules whose weight (by identity) `weights` names."""
    from torch import nn

    from featherweight.runtimes.torch.linear import InputRange, Matrix, of_rows

    make, quantized = kind.layer(), packed.quantized
    for path, module in list(model.named_modules(remove_duplicate=False)):
        name = weights.get(id(getattr(module, "weight", None)))
        if name is None:
            continue
        stored = packed.rest.get(path + RANGE)
        here = None if stored is None else InputRange.of(stored)
        bias = packed.rest.get(f"{path}.bias")
        matrix = Matrix(quantized.grids[name], quantized.q[name], quantized.scales[name], bias, here)
        model.set_submodule(path, of_rows(module, matrix) if isinstance(module, nn.Embedding) else make(matrix))
