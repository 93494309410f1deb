"""Models whose weights stay in their files: what is larger than memory still computes.

Weights that are stored in float32 are memory-mapped. Others are read and widened when a module begins to compute with them and let
go of when it ends, so that beside activations no more than one module's weights is held. Outside of its module a parameter holds
NaN, in no memory: whoever reads it there shows in the result.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.files import CONFIG, Listing, find_weights
from featherweight.checkpoint.opening import load_config, load_model
from featherweight.checkpoint.tensors import read_shapes, stream_tensors
from featherweight.model.architecture import attention_options, auto_class, family_of
from featherweight.model.names import reading
from featherweight.model.sparsity import Sparsity
from featherweight.system.device import torch_device

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

LARGE = 2 * 2**30
"""Bytes of weights in float32 from which on they stay in the files."""

Change = Callable[[str, "Tensor"], "Tensor"]
"""What a weight of the model is computed with in place of the stored one, by its name."""


def is_large(folder: Path) -> bool:
    """Whether the weights of a checkpoint folder are to stay in its files: a large decoder's, dense, in safetensors."""
    weights = find_weights(Listing.of(folder))
    if weights.pickled or Sparsity.read(folder) or "quantization_config" in json.loads((folder / CONFIG).read_text()):
        return False
    shapes = read_shapes(Listing.of(folder), folder, weights).values()
    return 4 * sum(math.prod(shape) for shape in shapes) >= LARGE and family_of(load_config(folder)) == "causal"


def open_model(folder: Path) -> PreTrainedModel:
    """The model of a checkpoint folder to compute with, float32: its weights in memory, or in the files where they are large."""
    return (streamed_model(folder) if is_large(folder) else None) or load_model(folder)


def streamed_model(folder: Path, change: Change | None = None) -> PreTrainedModel | None:
    """The model of a folder, its weights in the files; None where the files do not hold every parameter as the model has it.

    No weight can be changed in place; `change` is asked at every use.
    """
    model = _skeleton(folder)
    stored = _stored(model, folder)
    names = {id(weight): name for name, weight in model.named_parameters(remove_duplicate=False) if name in stored}
    if any(id(weight) not in names or stored[names[id(weight)]].shape != weight.shape for weight in model.parameters()):
        return None
    device = torch_device()
    for name, buffer in model.named_buffers():
        buffer.data = stored.get(name, buffer.data).to(device, buffer.dtype)
    feeds = {id(weight): _Feed.of(names[id(weight)], stored, change, device) for weight in model.parameters()}
    for module in model.modules():
        _give(module, feeds)
    return model.eval()


def _skeleton(folder: Path) -> PreTrainedModel:
    """The model without weights, its buffers computed."""
    import torch
    from accelerate.big_modeling import init_on_device
    from transformers.initialization import no_init_weights

    config = load_config(folder)
    with init_on_device(torch.device("meta"), include_buffers=False), no_init_weights():
        model = auto_class(config).from_config(config, dtype=torch.float32, **attention_options(config))
    model.tie_weights()
    return model


def _stored(model: PreTrainedModel, folder: Path) -> Mapping[str, Tensor]:
    """The tensors of the files, memory-mapped, by the names under which the model has them."""
    read_as = reading(model)
    return {read_as(name): tensor for _, name, tensor in stream_tensors(folder, find_weights(Listing.of(folder)))}


class _Feed:
    """The values of one parameter, whatever its names: `parameter` has them while it is `fed`."""

    def __init__(self, parameter: nn.Parameter, read: Callable[[], Tensor] | None) -> None:
        self.parameter, self.read, self.nothing, self.users = parameter, read, parameter.data, 0

    @classmethod
    def of(cls, name: str, stored: Mapping[str, Tensor], change: Change | None, device: torch.device) -> _Feed:
        """With what is mapped as it is for good; with NaN, of which all share one, where it is to be read at each use."""
        import torch

        tensor = stored[name]
        if change is None and tensor.dtype == torch.float32 and device.type == "cpu":
            return cls(torch.nn.Parameter(tensor, requires_grad=False), None)
        nothing = torch.full((1,), torch.nan, device=device).expand(tensor.shape)

        def read() -> Tensor:
            return (change(name, tensor) if change else tensor).to(device, torch.float32)

        return cls(torch.nn.Parameter(nothing, requires_grad=False), read)

    def fill(self) -> None:
        if self.read is not None and not self.users:
            self.parameter.data = self.read()
        self.users += 1

    def empty(self) -> None:
        self.users -= 1
        if self.read is not None and not self.users:
            self.parameter.data = self.nothing


def _give(module: nn.Module, feeds: Mapping[int, _Feed]) -> None:
    """Put the fed parameters in place of the module's own."""
    mine = {name: feeds[id(weight)] for name, weight in module._parameters.items() if weight is not None}
    for name, feed in mine.items():
        module._parameters[name] = feed.parameter
    here = [feed for feed in mine.values() if feed.read is not None]

    def fill(*_: Any) -> None:
        for feed in here:
            feed.fill()

    def empty(*_: Any) -> None:
        for feed in here:
            feed.empty()

    if here:
        module.register_forward_pre_hook(fill)
        module.register_forward_hook(empty, always_call=True)
