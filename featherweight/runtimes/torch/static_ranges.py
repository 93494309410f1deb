"""Ranges of activations for static int8, found by torchao's PT2E flow on calibration text.

Every Linear layer is exported by itself (a whole decoder with its cache does not export as one graph for any length), given
observers by the X86InductorQuantizer, and put back into the model, which then reads the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.errors import ToolchainError
from featherweight.model.heads import forwarded
from featherweight.model.matrices import matrices
from featherweight.text.model_inputs import example_blocks, unpadded_inputs

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from featherweight.runtimes.torch.linear import InputRange

BLOCKS = 16
BLOCK_TOKENS = 128


def input_ranges(model: PreTrainedModel, names: Iterable[str], source: Path, text: Path, seed: int = 0) -> dict[str, InputRange]:
    """How to round the input of each Linear layer that has one of these weights, by the path of the layer.

    The layers compute with `model`'s weights as they are (already on their grid). source: has the tokenizer.
    """
    import torch

    length = min(BLOCK_TOKENS, getattr(model.config, "max_position_embeddings", None) or BLOCK_TOKENS)
    blocks = example_blocks(source, model.config, text, length, BLOCKS, seed)
    with observed(model, set(names)) as graphs, torch.no_grad():
        for inputs in unpadded_inputs(model.config, blocks, 1):
            forwarded(model, inputs)
    return {path: _range(graph) for path, graph in graphs.items()}


@contextmanager
def observed(model: PreTrainedModel, names: set[str]) -> Iterator[dict[str, Any]]:
    """`model` with an observed graph in the place of each Linear layer; yields them by path. At the end it is as it was."""
    layers = linear_layers(model, names)
    graphs = {path: _prepare(_linear(layer, transposed)) for path, (layer, transposed) in layers.items()}
    with replaced({path: (layer, _flattened(graphs[path])) for path, (layer, _) in layers.items()}):
        yield graphs


@contextmanager
def simulated(model: PreTrainedModel, ranges: Mapping[str, InputRange]) -> Iterator[None]:
    """`model` with every layer's input rounded as a static engine rounds it, and computed in float: what it should compute."""
    layers = {path: model.get_submodule(path) for path in ranges}
    with replaced({path: (layer, _behind(_within(ranges[path]), layer.forward)) for path, layer in layers.items()}):
        yield


@contextmanager
def simulated_by_token(model: PreTrainedModel, names: set[str], rounded: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The same of an engine that finds the ranges as it reads: `rounded` is what it makes of a layer's input."""
    layers = linear_layers(model, names)
    with replaced({path: (layer, _behind(rounded, layer.forward)) for path, (layer, _) in layers.items()}):
        yield


@contextmanager
def replaced(forwards: Mapping[str, tuple[Any, Callable[[Tensor], Tensor]]]) -> Iterator[None]:
    """Modules with another forward each, for a while."""
    for layer, forward in forwards.values():
        layer.forward = forward
    try:
        yield
    finally:
        for layer, _ in forwards.values():
            del layer.forward


def linear_layers(model: PreTrainedModel, names: set[str]) -> dict[str, tuple[Any, bool]]:
    """(layer, whether its weight is stored transposed) by path, of all layers but embeddings with one of these weights."""
    from torch import nn

    wanted = {id(parameter): transposed for name, parameter, transposed in matrices(model) if name in names}
    return {
        path: (module, wanted[id(module.weight)])
        for path, module in model.named_modules()
        if id(getattr(module, "weight", None)) in wanted and not isinstance(module, nn.Embedding)
    }


def _linear(layer: Any, transposed: bool) -> nn.Linear:
    """A plain Linear around a layer's weights; GPT-2's Conv1D holds them transposed."""
    from torch import nn

    weight = layer.weight.detach().T.contiguous() if transposed else layer.weight.detach()
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return linear.eval()


def _prepare(linear: nn.Linear) -> Any:
    """PT2E's first half: the exported graph of one layer over [rows, columns], with observers."""
    import torch
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    from featherweight.runtimes.torch.linear import saturates

    rows = torch.export.Dim("rows", min=2)
    graph = torch.export.export(linear, (torch.zeros(4, linear.in_features),), dynamic_shapes=({0: rows},)).module()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(reduce_range=saturates()))
    return prepare_pt2e(graph, quantizer)


def _within(here: InputRange) -> Callable[[Tensor], Tensor]:
    import torch

    return lambda x: torch.fake_quantize_per_tensor_affine(x, here.scale, here.zero_point, 0, here.most)


def _behind(rounded: Callable[[Tensor], Tensor], forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: forward(rounded(x))


def _flattened(graph: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: graph(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def _range(graph: Any) -> InputRange:
    """PT2E's second half, of which only the rounding of the input is taken."""
    import torch
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    from featherweight.runtimes.torch.linear import InputRange

    rounding = torch.ops.quantized_decomposed.quantize_per_tensor.default
    found = next((node.args for node in convert_pt2e(graph).graph.nodes if node.target == rounding), None)
    if found is None:
        raise ToolchainError(
            f"torchao does not round the inputs of a layer with torch {torch.__version__}; take torch 2.13, or torch-dynamic"
        )
    _, scale, zero_point, _, most, _ = found
    return InputRange(scale, zero_point, most)
