"""The weight matrices of a model: which there are, which are its vocabulary's, and how they move to a grid.

The model itself is asked, in this one place: whoever quantizes, packs, measures or counts means the same matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.grid import Grid, row_chunks
from featherweight.model.quantized_weights import QuantizedWeights
from featherweight.store.mapped import give_back, spilled

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


def matrices(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """(name, parameter, transposed) of every weight matrix: those of the blocks, embeddings and head.

    A tied one comes once, under the name that it is stored by, wherever the head stands (CamemBERT's is before the embedding).
    transposed: the parameter holds a row in each column, as GPT-2's Conv1D does.
    """
    from transformers.pytorch_utils import Conv1D

    seen: set[int] = set()
    vocabulary, body = ends(model), set(_in_blocks(model))
    for name, module in model.named_modules():
        parameter = getattr(module, "weight", None)
        if parameter is None or id(parameter) in seen or not (id(parameter) in vocabulary or module in body):
            continue
        seen.add(id(parameter))
        yield _stored_name(model, f"{name}.weight"), parameter, isinstance(module, Conv1D)


def _stored_name(model: PreTrainedModel, name: str) -> str:
    source = (getattr(model, "all_tied_weights_keys", None) or {}).get(name, name)
    return source if model.get_parameter(source) is model.get_parameter(name) else name


def _in_blocks(model: PreTrainedModel) -> Iterator[nn.Module]:
    """The linear layers inside the blocks. Blocks stand in lists, and nothing else that is linear does."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    stacks = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return (module for stack in stacks for module in stack.modules() if isinstance(module, nn.Linear | Conv1D))


def ends(model: PreTrainedModel) -> set[int]:
    """Identities of the parameters with a row for each token: the embeddings of the model and its stacks, and the output head.

    What reads pictures beside the text has an embedding of four dimensions, which is none of these.
    """
    from transformers import PreTrainedModel

    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    modules = [found for one in models for found in (_embeddings(one), one.get_output_embeddings())]
    return {id(module.weight) for module in modules if module is not None and module.weight.ndim == 2}


def _embeddings(model: PreTrainedModel) -> nn.Module | None:
    """None of a wrapper about a stack, as TrOCR's is, which does not say: the stack itself does."""
    try:
        found: nn.Module | None = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return found


def heads(model: PreTrainedModel) -> frozenset[str]:
    """Names of the parameters with a row for each token, every name of a tied one."""
    vocabulary = ends(model)
    named = model.named_parameters(remove_duplicate=False)
    return frozenset(name for name, parameter in named if id(parameter) in vocabulary)


def in_float(model: PreTrainedModel, quantized: QuantizedWeights) -> dict[str, int]:
    """Number of weights of each parameter that lies on no grid, by name, the largest first; a tied one comes once."""
    on_grids = {id(parameter) for name, parameter, _ in matrices(model) if name in quantized.q}
    rest = {name: parameter.numel() for name, parameter in model.named_parameters() if id(parameter) not in on_grids}
    return dict(sorted(rest.items(), key=lambda item: -item[1]))


def round_to_nearest(model: PreTrainedModel, body: Grid, head: Grid | None, room: Path | None = None) -> QuantizedWeights:
    """Every matrix of `model` on its grid: `head` for embeddings and output head (None: in float), `body` for the blocks'.

    room: a folder on the disk for the integers; by default they stand in memory.
    """
    result, vocabulary = QuantizedWeights({}, {}, {}, "rtn", heads(model)), ends(model)
    for name, parameter, transposed in matrices(model):
        grid = head if id(parameter) in vocabulary else body
        if grid is None:
            continue
        result.grids[name] = grid
        made = quantized_rows(grid, rows_of(parameter, transposed))
        result.q[name], result.scales[name] = (spilled(one, room) for one in made)
        give_back(parameter)
    return result


def quantized_rows(grid: Grid, weight: Tensor, scales_of: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """`weight` [rows, columns] rounded to nearest, with little memory beside it: q [rows, columns], float32 scales [rows, groups].

    scales_of: the scales of some rows, by default the grid's own.
    """
    import torch

    q = torch.empty(weight.shape, dtype=grid.dtype, device=weight.device)
    scales = torch.empty(weight.shape[0], grid.groups(weight.shape[1]), device=weight.device)
    for rows in row_chunks(*weight.shape):
        q[rows], scales[rows] = grid.quantize(weight[rows], scales_of(weight[rows]) if scales_of else None)
    return q, scales


def move_to_grid(model: PreTrainedModel, quantized: QuantizedWeights) -> None:
    """Give `model` the float weights that `quantized` stands for, in place."""
    import torch

    with torch.no_grad():
        for name, parameter, transposed in matrices(model):
            if name in quantized.q:
                rows_of(parameter, transposed).copy_(quantized.dequantize(name))


def on_grid(model: PreTrainedModel, quantized: QuantizedWeights) -> Callable[[str, Tensor], Tensor]:
    """What `move_to_grid` would make of a weight, by its name in `model`; the weight itself where it lies on no grid."""
    transposed = {name for name, _, turned in matrices(model) if turned}

    def moved(name: str, weight: Tensor) -> Tensor:
        if name not in quantized.q:
            return weight
        return quantized.dequantize(name).T if name in transposed else quantized.dequantize(name)

    return moved


def rows_of(parameter: nn.Parameter, transposed: bool) -> Tensor:
    """[rows, columns], a view."""
    return parameter.detach().T if transposed else parameter.detach()
