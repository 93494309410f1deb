"""Weights, gradients and moments of one model divided among processes: FSDP2, torch's `fully_shard`.

Each process keeps a share of the rows of every weight; a block is put together while it computes and let go of afterwards. Outside
of that a weight is a DTensor, of which this process has its own part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


def is_part(tensor: Tensor) -> bool:
    """Whether a tensor is divided among the processes."""
    return hasattr(tensor, "full_tensor")


def part(tensor: Any) -> Tensor:
    """What this process has of a tensor: all of one that is not divided."""
    return tensor.to_local() if is_part(tensor) else tensor


def whole(tensor: Any) -> Tensor:
    """A tensor put together, which all processes do at once."""
    return tensor.full_tensor() if is_part(tensor) else tensor


def as_part(own: Tensor, like: Any) -> Tensor:
    """`own`, this process's part, as a tensor that is divided as `like` is."""
    from torch.distributed.tensor import DTensor

    if not is_part(like):
        return own
    layout = {"shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(own.to(like.device), like.device_mesh, like.placements, run_check=False, **layout)


def part_of(every: Tensor, like: Any) -> Tensor:
    """This process's part of a tensor that each has as a whole, divided as `like` is."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(every, like.device_mesh, like.placements, src_data_rank=None).to_local()


def square_sum(gradients: Iterable[Tensor]) -> float:
    """Sum of the squares of what this process has of `gradients`."""
    return sum(part(gradient).double().square().sum().item() for gradient in gradients)


class Shards:
    """The transformers models inside a module, divided among the `size` processes on `device`, in float32.

    `gather` undoes it. Of weights that lie in a checkpoint's files no more than a block is in memory at once meanwhile.
    """

    def __init__(self, module: nn.Module, device: torch.device, size: int) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self._module = module
        self._before = [(one, type(one), _hooks(one)) for one in module.modules()]
        mesh = init_device_mesh(device.type, (size,))
        for model in _models(module):
            for inner in [*_blocks(model), model]:
                _own(inner, device)
                made: Any = fully_shard(inner, mesh=mesh, reshard_after_forward=True)
                # Each process's loss is its share of the batch's: gradients are summed, not averaged.
                made.set_gradient_divide_factor(1.0)
                made.set_force_sum_reduction_for_comms(True)
        _own(module, device)

    def gather(self, keep: bool) -> None:
        """Make the module what it was, its weights whole in main memory where this process is to `keep` them; else without values.

        All processes do so at once.
        """
        import torch

        made: dict[int, nn.Parameter] = {}
        for one, kind, hooks in self._before:
            for name, weight in one._parameters.items():
                if weight is None or not is_part(weight):
                    continue
                if id(weight) not in made:
                    values = whole(weight.detach())
                    values = values.cpu() if keep else torch.empty_like(values, device="meta")
                    made[id(weight)] = torch.nn.Parameter(values, requires_grad=weight.requires_grad)
                one._parameters[name] = made[id(weight)]
            one.__class__ = kind
            one.__dict__.update(hooks)


def _models(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost transformers models of a module, whose forward is what is called."""
    from transformers import PreTrainedModel

    if isinstance(module, PreTrainedModel):
        yield module
        return
    for child in module.children():
        yield from _models(child)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that stand in lists, the innermost not among them: a model's layers."""
    from torch import nn

    found: list[nn.Module] = []
    for one in model.modules():
        if isinstance(one, nn.ModuleList):
            found += [child for child in one if not any(child in set(outer.modules()) for outer in found)]
    return found


def _own(module: nn.Module, device: torch.device) -> None:
    """Weights in float32 on `device`, in memory that nothing else lies in: they may be mapped from files that are only read."""
    import torch

    for weight in module.parameters():
        if not is_part(weight):
            weight.data = weight.data.to(device, torch.float32, copy=True).contiguous()
    for one in module.modules():
        for name, buffer in one._buffers.items():
            if buffer is not None:
                one._buffers[name] = buffer.to(device)


def _hooks(module: nn.Module) -> dict[str, Any]:
    return {name: value.copy() for name, value in vars(module).items() if "_hooks" in name and hasattr(value, "copy")}
