"""The importance of columns, as llama.cpp's imatrix has it: the mean square of what each input channel of a matrix carries.

An error of a weight moves what its row puts out by so much times what the weight's channel carries: where that is much, it is dear.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from featherweight.model.blockwise import moved
from featherweight.model.heads import forwarded
from featherweight.model.matrices import matrices
from featherweight.text.model_inputs import unpadded_inputs

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

TOGETHER = 8
"""Blocks that are read at once."""
LEAST = 1e-6
"""Of the mean: what a channel counts for that carried nothing on the text, and may on another."""


def importances(model: PreTrainedModel, blocks: Tensor) -> Mapping[str, Tensor]:
    """Float32 [columns] of every matrix that reads numbers, by the parameter's name, on calibration `blocks` without padding.

    A tied head stands under the embedding's name; an embedding alone reads none.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    names = {id(parameter): name for name, parameter, _ in matrices(model)}
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watch(name: str) -> Any:
        def hook(module: Any, inputs: Any) -> None:
            read = inputs[0].detach().flatten(0, -2)
            sums[name] = sums.get(name, 0) + read.double().square().sum(0)
            counts[name] = counts.get(name, 0) + len(read)

        return hook

    with ExitStack() as here, torch.no_grad():
        for module in model.eval().modules():
            if isinstance(module, torch.nn.Linear | Conv1D) and id(module.weight) in names:
                here.callback(module.register_forward_pre_hook(watch(names[id(module.weight)])).remove)
        for inputs in unpadded_inputs(model.config, blocks, TOGETHER):
            forwarded(model, moved(inputs, model.device))
    return {name: _weighed(total / counts[name]) for name, total in sums.items()}


def _weighed(squares: Tensor) -> Tensor:
    """As shares of their mean; all alike where nothing was carried."""
    import torch

    mean = squares.mean()
    return (squares / mean).clamp_min(LEAST).float().cpu() if mean > 0 else torch.ones(len(squares))
