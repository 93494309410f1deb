"""The weights that bitsandbytes computes with: what nf4 and llm.int8 make of a model's Linear layers as it is loaded.

bitsandbytes rounds on the GPU, in its own kernels. Here the same numbers come from the definitions, so that PyTorch computes with
the weights that are served, and the difference that is left is that of the engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

NF4_BLOCK = 64
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""4-bit NormalFloat: quantiles of a normal distribution, the largest 1 (Dettmers et al. 2023, appendix E)."""


def move_to_grid(model: PreTrainedModel, kind: str) -> None:
    """Give `model`, in place, the weights that bitsandbytes serves it with; all that it leaves alone becomes float16.

    kind: 'nf4' or 'llm.int8'. Which layers it leaves alone is transformers' own rule: the output head, and what is tied.
    """
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept, grid = get_keys_to_not_convert(model), {"nf4": nf4, "llm.int8": int8_rows}[kind]
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.half().float()
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | Conv1D) and should_convert_module(name, kept):
                turned = isinstance(module, Conv1D)
                rounded = grid(module.weight.T if turned else module.weight)
                module.weight.copy_(rounded.T if turned else rounded)


def nf4(weight: Tensor) -> Tensor:
    """Every 64 weights, row after row, over the largest of them, each moved to the nearest of the 16 numbers; float16 again."""
    import torch

    flat = torch.nn.functional.pad(weight.float().flatten(), (0, -weight.numel() % NF4_BLOCK)).view(-1, NF4_BLOCK)
    peak = flat.abs().amax(1, keepdim=True)
    steps = flat / torch.where(peak == 0, torch.ones_like(peak), peak)
    numbers = torch.tensor(NF4)
    places = torch.bucketize(steps, (numbers[1:] + numbers[:-1]) / 2)
    return (numbers[places] * peak).flatten()[: weight.numel()].view(weight.shape).half().float()


def int8_rows(weight: Tensor) -> Tensor:
    """127 steps either side of zero, up to the largest weight of each row (Dettmers et al. 2022)."""
    peak = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-30)
    return (weight.float() * (127 / peak)).round() * (peak / 127)
