"""Models whose weights stay in their files: what is larger than memory still computes.

Weights that are stored in float32 are memory-mapped. Others are read and widened when a module begins to compute with them and let
go of when it ends, so that beside activations no more than one module's weights is held. Outside of its module a parameter holds
NaN, in no memory: whoever reads it there shows in the result.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.files import CONFIG, Listing, find_weights
from featherweight.checkpoint.opening import load_config, load_model
from featherweight.checkpoint.tensors import read_shapes, stream_tensors
from featherweight.model.architecture import attention_options, auto_class, family_of, stacks
from featherweight.model.names import reading
from featherweight.model.sparsity import Sparsity
from featherweight.model.surgery import copy_layers
from featherweight.store.mapped import give_back, spilled
from featherweight.system.device import CPU, Device, torch_device

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel

LARGE = 2 * 2**30
"""Bytes of weights in float32 from which on they stay in the files."""

NOTHING: Mapping[str, Tensor] = MappingProxyType({})

Change = Callable[[str, "Tensor"], "Tensor"]
"""What a weight of the model is computed with in place of the stored one, by its name."""


def is_large(folder: Path) -> bool:
    """Whether the weights of a checkpoint folder are to stay in its files: a large decoder's, dense, in safetensors."""
    weights = find_weights(Listing.of(folder))
    if weights.pickled or Sparsity.read(folder) or "quantization_config" in json.loads((folder / CONFIG).read_text()):
        return False
    shapes = read_shapes(Listing.of(folder), folder, weights).values()
    return 4 * sum(math.prod(shape) for shape in shapes) >= LARGE and family_of(load_config(folder)) == "causal"


def open_model(folder: Path, room: Path | None = None, instead: Mapping[str, Tensor] = NOTHING) -> PreTrainedModel:
    """The model of a checkpoint folder to compute with, float32: its weights in memory, or in the files where they are large.

    room, instead: see `streamed_model`.
    """
    model = streamed_model(folder, room=room, instead=instead) if is_large(folder) else None
    if model is None:
        model = load_model(folder)
        model.load_state_dict(dict(instead), strict=False)
    return model


def streamed_model(
    folder: Path,
    change: Change | None = None,
    device: Device | None = None,
    layers: tuple[int, ...] | None = None,
    room: Path | None = None,
    instead: Mapping[str, Tensor] = NOTHING,
) -> PreTrainedModel | None:
    """The model of a folder, its weights in the files; None where the files do not hold every parameter as the model has it.

    No weight can be changed in place; `change` is asked at every use. device: where it computes, by default the one in use.
    layers: those that it is made of, by default all; `change` is asked by the names that the whole model has.
    room: a folder for what weights become while they are `held`; by default that is forgotten. instead: tensors, by the model's
    names, that stand in for the stored ones.
    """
    model, stored, named = _unfilled(folder, layers)
    if stored is None:
        return None
    stored |= instead
    where = torch_device(device)
    for name, buffer in model.named_buffers():
        buffer.data = stored.get(name, buffer.data).to(where, buffer.dtype)
    feeds = {}
    for name, weight in _first_names(model, stored).items():
        changed = partial(change, named.get(name, name), stored[name]) if change else None
        feeds[id(weight)] = _Feed(stored[name], changed, where, room)
    for module in model.modules():
        _give(module, feeds)
    return model.eval()


def mapped_model(folder: Path, layers: tuple[int, ...] | None = None) -> PreTrainedModel | None:
    """The model of a folder for what reads its weights and computes nothing; None as `streamed_model`.

    Matrices are memory-mapped in the type that they are stored in, all else is float32 in memory. layers: see `streamed_model`.
    """
    import torch

    model, stored, _ = _unfilled(folder, layers)
    if stored is None:
        return None
    for name, buffer in model.named_buffers():
        buffer.data = stored.get(name, buffer.data).to(buffer.dtype)
    given = {}
    for name, weight in _first_names(model, stored).items():
        tensor = stored[name] if weight.ndim > 1 else stored[name].float()
        given[id(weight)] = torch.nn.Parameter(tensor, requires_grad=False)
    for module in model.modules():
        module._parameters.update({name: given[id(one)] for name, one in module._parameters.items() if one is not None})
    return model.eval()


def open_to_train(folder: Path, sharded: bool) -> PreTrainedModel:
    """The model of a folder to train: float32 in memory, or, where it will be `sharded`, still in the files if they allow it."""
    model = mapped_model(folder) if sharded else None
    return model.requires_grad_(True) if model else load_model(folder)


def _unfilled(folder: Path, layers: tuple[int, ...] | None) -> tuple[PreTrainedModel, dict[str, Tensor] | None, dict[str, str]]:
    """The model of a folder without weights, of `layers` alone; its tensors as stored, by its own names, None where they do not
    hold every parameter as it has it; and the whole model's names by its own, where the two differ.
    """
    whole = model = _skeleton(folder)
    stored, named = dict(_stored(whole, folder)), dict[str, str]()
    if layers is not None:
        model = copy_layers(whole, layers)
        pairs = [
            (f"{new.name}.", f"{old.blocks[layers[place]].name}.")
            for old, stack in zip(stacks(whole), stacks(model), strict=True)
            for place, new in enumerate(stack.blocks)
        ]
        named = {
            name: before + name.removeprefix(after)
            for name, _ in model.named_parameters(remove_duplicate=False)
            for after, before in pairs
            if name.startswith(after)
        }
        stored |= {name: stored[before] for name, before in dict(named).items() if before in stored}
    first = _first_names(model, stored)
    shapes = {id(weight): stored[name].shape for name, weight in first.items()}
    whole_there = all(shapes.get(id(weight)) == weight.shape for weight in model.parameters())
    return model, stored if whole_there else None, named


def _first_names(model: PreTrainedModel, stored: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """Each parameter that is stored, a tied one by the first of its names."""
    named = [(name, weight) for name, weight in model.named_parameters(remove_duplicate=False) if name in stored]
    names = {id(weight): name for name, weight in reversed(named)}
    return {name: weight for name, weight in named if names[id(weight)] == name}


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
    return {read_as(name): tensor for _, name, tensor in stream_tensors(folder, find_weights(Listing.of(folder)), sealed=True)}


class _Feed:
    """The values of one parameter, whatever its names: `parameter` has them while it is `fed`."""

    def __init__(self, stored: Tensor, change: Callable[[], Tensor] | None, device: torch.device, room: Path | None = None) -> None:
        """change: what is computed with in place of what is stored. room: where what it becomes is kept."""
        import torch

        self.users, self.kept, self.device, self.room = 0, False, device, room
        self._take(stored, change)
        self.parameter = torch.nn.Parameter(self.nothing, requires_grad=False)

    def _take(self, stored: Tensor, change: Callable[[], Tensor] | None) -> None:
        import torch

        self.stored, self.change = stored, change
        self.as_stored = change is None and stored.dtype == torch.float32 and self.device.type == CPU
        # Of NaN all share one.
        self.nothing = stored if self.as_stored else torch.full((1,), torch.nan, device=self.device).expand(stored.shape)

    def read(self) -> Tensor:
        """The values, in memory unless they are mapped as they are."""
        import torch

        if self.as_stored:
            return self.stored
        return (self.change() if self.change else self.stored).to(self.nothing.device, torch.float32)

    def fill(self) -> None:
        if not self.users:
            self.parameter.data = self.read()
        self.users += 1

    def empty(self) -> None:
        self.users -= 1
        if not self.users:
            self.parameter.data = self.nothing
            give_back(self.stored)

    def hold(self) -> None:
        self.parameter.data = self.read().clone() if self.as_stored else self.read()
        self.users += 1

    def keep(self, held: Tensor) -> None:
        """Let what was `held` stand in for what is stored, where it is something else now and there is room for it."""
        import torch

        if self.room is not None and not torch.equal(held, self.read()):
            self.kept = True
            self._take(spilled(held.detach().cpu(), self.room), None)


def _give(module: nn.Module, feeds: Mapping[int, _Feed]) -> None:
    """Put the fed parameters in place of the module's own."""
    import torch

    mine = {name: feeds[id(weight)] for name, weight in module._parameters.items() if weight is not None}
    for name, feed in mine.items():
        module._parameters[name] = feed.parameter
    module.__dict__[FED] = mine
    if _looks_up(module) and mine["weight"].change is None:
        module.forward = partial(_rows, mine["weight"].stored, mine["weight"].nothing.device)
        return

    def fill(*_: Any) -> None:
        for feed in mine.values():
            feed.fill()

    def empty(*_: Any) -> None:
        for feed in mine.values():
            feed.empty()

    if isinstance(module, torch.nn.Conv1d):
        fill()  # few weights, which the layer around it reads by itself (LFM2, Mamba)
    elif mine:
        module.register_forward_pre_hook(fill)
        module.register_forward_hook(empty, always_call=True)


def _looks_up(module: nn.Module) -> bool:
    """Whether a module does nothing but read rows of its weight."""
    import torch

    return type(module) is torch.nn.Embedding and module.max_norm is None


def _rows(stored: Tensor, device: torch.device, ids: Tensor) -> Tensor:
    """Those of an embedding, without reading the others."""
    import torch

    return torch.nn.functional.embedding(ids.to(stored.device), stored).to(device, torch.float32)


FED = "fed"
"""Under which a module has its feeds, by the names of its parameters."""


def kept_weights(model: nn.Module) -> dict[str, Tensor]:
    """What weights of a streamed `model` became while they were held, by name; a tied one comes under each of its names."""
    fed = ((name, feeds) for name, module in model.named_modules() if (feeds := vars(module).get(FED)))
    return {f"{name}.{key}": feed.stored for name, feeds in fed for key, feed in feeds.items() if feed.kept}


def is_streamed(model: nn.Module) -> bool:
    """Whether the weights of `model` stay in its files."""
    return any(FED in vars(module) for module in model.modules())


@contextmanager
def held(module: nn.Module) -> Iterator[None]:
    """The weights of `module` and all inside it in memory, to be changed.

    If its model streams they leave it afterwards: what they became is kept where the model was given room, and else forgotten.
    """
    fed = [(one, name, feed) for one in module.modules() for name, feed in vars(one).get(FED, {}).items()]
    for _, _, feed in fed:
        feed.hold()
    try:
        yield
    finally:
        for one, name, feed in fed:
            feed.keep(one._parameters[name])
            one._parameters[name] = feed.parameter
            feed.empty()
