"""Weights of which transformers computes with something else than the file holds.

What gives fresh weights their first values passes loaded ones by, which it knows by a mark; a part of a loaded weight has no mark.
So Youtu and Funnel zero the padding token's row of the embedding that they have just read, and of a head that is tied to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from featherweight.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

_MARK = "_is_hf_initialized"


def overwritten(model: PreTrainedModel) -> frozenset[str]:
    """Every name of the weights that `model`, without memory for them, writes to or replaces once they are loaded."""
    before = {name: _storage(weight) for name, weight in _weights(model).items()}
    with _writes() as storages:
        _initialize(model)
    after = {name: _storage(weight) for name, weight in _weights(model).items()}
    return frozenset(name for name, storage in before.items() if storage in storages or after[name] != storage)


def as_loaded(model: PreTrainedModel, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the weights `stored`, by the names of `model`, are once transformers has loaded them; only those that are others then.

    Raises CheckpointError where they become something else each time.
    """
    import torch

    once, again = _initialized(model, stored, seed=0), _initialized(model, stored, seed=1)
    for name, tensor in once.items():
        if not torch.equal(tensor, again[name]):
            kind = model.config.model_type
            raise CheckpointError(f"transformers gives {name} of a {kind} model random values when it loads it; take another model")
    return {name: tensor for name, tensor in once.items() if not torch.equal(tensor, stored[name])}


def write_as_loaded(model: PreTrainedModel) -> None:
    """Let the weights of `model`, which training may have changed, be what transformers makes of them when it loads them."""
    import torch

    with torch.device("meta"):
        bare = type(model)(model.config)
    names = overwritten(bare)
    state = model.state_dict(keep_vars=True)
    changed = as_loaded(bare, {name: tensor.detach() for name, tensor in state.items() if name in names})
    for name, tensor in changed.items():
        state[name].data.copy_(tensor)


def _initialized(model: PreTrainedModel, stored: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    import torch

    model = deepcopy(model)
    for name, tensor in stored.items():
        _give(model, name, tensor.clone())
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        _initialize(model)
    return {name: tensor.detach() for name, tensor in _weights(model).items() if name in stored}


def _initialize(model: PreTrainedModel) -> None:
    """What transformers does at the end of loading, all weights of `model` being loaded."""
    for weight in model.state_dict(keep_vars=True).values():
        setattr(weight, _MARK, True)
    for module in model.modules():
        vars(module).pop(_MARK, None)
    model.initialize_weights()


def _weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return dict(model.state_dict(keep_vars=True))


def _storage(tensor: Tensor) -> int:
    """The identity of what a tensor and its views lie in."""
    return int(tensor.untyped_storage()._cdata)


def _give(model: PreTrainedModel, name: str, tensor: Tensor) -> None:
    """Let what stands under this name alone have these values, as loading does: ties come afterwards."""
    import torch

    place, _, own = name.rpartition(".")
    module = model.get_submodule(place)
    if own in module._buffers:
        module._buffers[own] = tensor
    else:
        module._parameters[own] = torch.nn.Parameter(tensor, requires_grad=False)


@contextmanager
def _writes() -> Iterator[set[int]]:
    """What is written to meanwhile, as `_storage` has it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    found: set[int] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            given = [*args, *(kwargs or {}).values()]
            for argument, value in zip(func._schema.arguments, given, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    found.add(_storage(value))
            return func(*args, **(kwargs or {}))

    with Watch():
        yield found
