"""The weight matrices of a model: which there are, and how they move to a grid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from featherweight.grid import Grid
from featherweight.model.quantized_weights import QuantizedWeights

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


def matrices(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """(name, parameter, transposed) of every weight matrix: Linear layers, the token embedding, the head. A tied one comes once.

    transposed: the parameter holds a row in each column, as GPT-2's Conv1D does.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    seen: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) and module is not model.get_input_embeddings():
            continue
        parameter = module.get_parameter("weight")
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield f"{name}.weight", parameter, isinstance(module, Conv1D)


def ends(model: PreTrainedModel) -> set[int]:
    """Identities of the parameters of the token embedding and the output head."""
    modules = (model.get_input_embeddings(), model.get_output_embeddings())
    return {id(module.weight) for module in modules if module is not None}


def round_to_nearest(model: PreTrainedModel, body: Grid, head: Grid | None) -> QuantizedWeights:
    """Every matrix of `model` on its grid: `head` for the embedding and the output head (None: in float), `body` for all others."""
    result, vocabulary = QuantizedWeights({}, {}, {}, "rtn"), ends(model)
    for name, parameter, transposed in matrices(model):
        grid = head if id(parameter) in vocabulary else body
        if grid is None:
            continue
        result.grids[name] = grid
        result.q[name], result.scales[name] = grid.quantize(rows_of(parameter, transposed))
    return result


def move_to_grid(model: PreTrainedModel, quantized: QuantizedWeights) -> None:
    """Give `model` the float weights that `quantized` stands for, in place."""
    import torch

    with torch.no_grad():
        for name, parameter, transposed in matrices(model):
            if name in quantized.q:
                rows_of(parameter, transposed).copy_(quantized.dequantize(name))


def rows_of(parameter: nn.Parameter, transposed: bool) -> Tensor:
    """[rows, columns], a view."""
    return parameter.detach().T if transposed else parameter.detach()
