"""A checkpoint in, OpenVINO's intermediate representation out: a decoder that keeps its own keys and values, or an encoder.

It is run by the toolchain's Python, which knows nothing of Featherweight: nothing but what the toolchain brings is imported here.
Each line that it says is JSON: {"note": ...} of what begins, and at the end {"graph": ...} or {"error": ...}.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

Say = Callable[..., None]
CLASSES = {
    "feature-extraction": "AutoModel",
    "fill-mask": "AutoModelForMaskedLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "text-generation": "AutoModelForCausalLM",
}
DECODER = "text-generation"
BATCH, NEW, PAST = 2, 3, 4
"""The shapes of what is traced, each another, so that none is mistaken for another."""
QUANTIZED, DESCRIPTION = "quantized.safetensors", "quantization.json"
"""Integers and scales of a quantize stage, beside the checkpoint."""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path, help="the .xml to write; its .bin is written beside it")
    parser.add_argument("--task", required=True, choices=sorted(CLASSES))
    parser.add_argument("--every-token", action="store_true", help="labels behind each, of which a decoder's own forward takes one")
    parser.add_argument("--attention", help="how transformers computes it, where PyTorch's fused kernel does not")
    options = parser.parse_args()
    say = speaker()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    try:
        without_telemetry()
        convert(options.checkpoint, options.out, options.task, options.attention, say, every_token=options.every_token)
    except Exception as error:
        say(error=f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")
        return 1
    say(graph=options.out.name)
    return 0


def speaker() -> Say:
    """Says things on standard output, which from now on libraries are kept from: what they print goes to standard error."""
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**told: object) -> None:
        print(json.dumps(told), file=stream, flush=True)

    return say


def without_telemetry() -> None:
    """OpenVINO reports each conversion to its makers where `openvino_telemetry` can be imported; from here on it cannot."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]


def convert(checkpoint: Path, out: Path, task: str, attention: str | None, say: Say, *, every_token: bool = False) -> None:
    """Write the graph of a checkpoint. Raises KeyError for weights that this transformers, or the graph, does not find."""
    import openvino
    import torch

    say(note="loading the checkpoint")
    model = load(checkpoint, task, attention)
    say(note="tracing the graph")
    with torch.no_grad():
        graph = decoder(model) if task == DECODER else encoder(model, every_token)
    if (checkpoint / QUANTIZED).is_file():
        say(note="packing the integers")
        pack(graph, model, checkpoint)
    openvino.save_model(graph, out, compress_to_fp16=False)


def load(checkpoint: Path, task: str, attention: str | None = None) -> Any:
    """The model in float32, its attention computed by PyTorch's fused kernel, which OpenVINO knows as one operation.

    attention: how else, where that kernel leaves something out.
    """
    import torch
    import transformers

    kind = getattr(transformers, CLASSES[task])
    # The other ways to compute experts count or walk through those that were hit, which a trace would freeze.
    options = {"dtype": torch.float32, "experts_implementation": "batched_mm", "attn_implementation": attention}
    model, told = kind.from_pretrained(checkpoint, local_files_only=True, output_loading_info=True, **options)
    missing = [name for name in told["missing_keys"] if "pooler" not in name]
    if lost := missing or told["mismatched_keys"]:
        raise KeyError(f"transformers {transformers.__version__} does not find {sorted(lost)[:3]} in the checkpoint")
    return model.eval()


def encoder(model: Any, every_token: bool = False) -> Any:
    """The graph of what answers a text at once: ids and mask in, hidden states or logits out."""
    import torch

    model.config.use_cache = False
    types = ["token_type_ids"] if (getattr(model.config, "type_vocab_size", None) or 0) > 1 else []
    names = ["input_ids", "attention_mask", *types]

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *told: Any) -> Any:
            inputs = dict(zip(names, told, strict=True))
            if getattr(model.config, "use_bidirectional_attention", False) and model.config.model_type == "gemma3_text":
                inputs["attention_mask"] = both_ways(inputs["attention_mask"], model.config.sliding_window)
            return model.score(model.base_model(**inputs)[0]) if every_token else model(**inputs)[0]

    mask = torch.ones(BATCH, NEW, dtype=torch.int64)
    mask[0, -1] = 0
    ids = torch.ones_like(mask) * 5
    graph = traced(Encoder(), (ids, mask, *(torch.zeros_like(ids) for _ in types)))
    hidden = model.config.architectures and not hasattr(model, "get_output_embeddings")
    name_ends(graph, names, ["last_hidden_state" if hidden else "logits"], {name: [-1, -1] for name in names})
    return graph


def both_ways(mask: Any, window: int) -> dict[str, Any]:
    """Where the tokens of a Gemma 3 that reads both ways look, by kind of layer, bool [batch, 1, tokens, tokens].

    transformers asks a function about each place, which no trace keeps; masks that are made already it takes as they are.
    """
    import torch

    places = torch.arange(mask.shape[1])
    apart = (places[:, None] - places[None]).abs()
    there = mask.bool()[:, None, None] | (apart == 0)  # padding that saw nothing would be no number
    return {"full_attention": there, "sliding_attention": there & (apart < window)}


def decoder(model: Any) -> Any:
    """The graph of a decoder: ids, mask and positions in, logits out; keys and values stay in it as its state."""
    import torch

    shapes = [list(shape) for shape in kept(model)]
    places = ["position_ids"] if "position_ids" in inspect.signature(type(model).forward).parameters else []
    told = ["input_ids", "attention_mask", *places]
    pasts = [f"past_key_values.{at // 2}.{('key', 'value')[at % 2]}" for at in range(len(shapes))]
    mask = torch.ones(BATCH, PAST + NEW, dtype=torch.int64)
    positions = torch.arange(PAST, PAST + NEW).repeat(BATCH, 1)
    past = [torch.randn(BATCH, heads, PAST, width) for heads, width in shapes]
    example = (torch.full((BATCH, NEW), 5), mask, *(positions for _ in places), *past)
    graph = traced(step(model, told), example)
    dimensions = {name: [-1, -1] for name in told}
    dimensions |= {name: [-1, heads, -1, width] for name, (heads, width) in zip(pasts, shapes, strict=True)}
    presents = [name.replace("past_key_values", "present") for name in pasts]
    name_ends(graph, [*told, *pasts], ["logits", *presents], dimensions)
    keep_state(graph, dict(zip(pasts, presents, strict=True)))
    return graph


def kept(model: Any) -> Iterator[tuple[int, int]]:
    """(heads, width) of all that a decoder keeps of a token, keys and values of each layer in turn."""
    import torch
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    model(input_ids=torch.full((1, NEW), 5), past_key_values=cache, use_cache=True)
    layers = getattr(cache, "layers", [])
    if not layers or any(type(layer).__name__ != "DynamicLayer" or layer.keys is None for layer in layers):
        raise TypeError(f"{model.config.model_type} keeps more than the keys and values of every layer")
    for layer in layers:
        for tensor in (layer.keys, layer.values):
            if tensor.ndim != 4 or tensor.shape[2] != NEW:
                raise TypeError(f"{model.config.model_type} keeps keys and values of another shape, {tuple(tensor.shape)}")
            yield int(tensor.shape[1]), int(tensor.shape[3])


def step(model: Any, names: list[str]) -> Any:
    """One pass of a decoder as a module of tensors: what `names` say and keys and values in, logits, keys and values out."""
    import torch
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *told: Any) -> Any:
            cache: Any = DynamicCache()
            past = told[len(names) :]
            for keys, values in zip(past[::2], past[1::2], strict=True):
                layer = DynamicLayer()
                layer.lazy_initialization(keys, values)
                layer.keys, layer.values = keys, values
                cache.layers.append(layer)
            inputs = dict(zip(names, told, strict=False))
            logits = self.model(**inputs, past_key_values=cache, use_cache=True).logits
            return (logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))

    return Step()


def traced(module: Any, example: tuple[Any, ...]) -> Any:
    """OpenVINO's graph of a module, by PyTorch's trace."""
    import openvino
    import torch

    return openvino.convert_model(torch.jit.trace(module, example, check_trace=False, strict=False), example_input=example)


def name_ends(graph: Any, inputs: list[str], outputs: list[str], shapes: Mapping[str, list[int]]) -> None:
    """Name what goes in and comes out, in order; what the model does not read is given all the same, and read by nothing."""
    import openvino

    if len(graph.inputs) != len(inputs) or len(graph.outputs) != len(outputs):
        raise TypeError(f"the graph has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs")
    for port, name in zip(graph.inputs, inputs, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
        port.get_node().set_partial_shape(openvino.PartialShape(shapes[name]))
    for port, name in zip(graph.outputs, outputs, strict=True):
        port.get_tensor().set_names({name})
    graph.validate_nodes_and_infer_types()


def keep_state(graph: Any, pairs: Mapping[str, str]) -> None:
    """Turn keys and values, which go in as a past and come out as a present, into state, empty at first.

    beam_idx: which sequence of the last pass each of this one goes on from, as OpenVINO's own pipelines want it.
    """
    import numpy
    from openvino import opset13 as ops
    from openvino._offline_transformations import apply_make_stateful_transformation

    beams = ops.parameter([-1], dtype=numpy.int32, name="beam_idx")
    beams.output(0).get_tensor().set_names({"beam_idx"})
    graph.add_parameters([beams])
    for name in pairs:
        port = graph.input(name)
        readers = list(port.get_target_inputs())
        chosen = ops.gather(port, beams, ops.constant(0, dtype=numpy.int64))
        for reader in readers:
            reader.replace_source_output(chosen.output(0))
    apply_make_stateful_transformation(graph, dict(pairs))
    shape = ops.shape_of(graph.input("input_ids"), output_type="i64")
    batch = ops.gather(shape, ops.constant([0], dtype=numpy.int64), ops.constant(0, dtype=numpy.int64))
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            rest = [0 if size.is_dynamic else size.get_length() for size in list(node.get_output_partial_shape(0))[1:]]
            sizes = ops.concat([batch, ops.constant(rest, dtype=numpy.int64)], axis=0)
            node.set_arguments([ops.broadcast(ops.constant(0.0, dtype=numpy.float32), sizes).output(0)])
    graph.validate_nodes_and_infer_types()


def pack(graph: Any, model: Any, checkpoint: Path) -> None:
    """Put the integers and scales of a quantize stage in the place of the float weights that they stand for.

    A constant is known by its bytes: those of a parameter, or of its transpose. Raises KeyError where one that a text is answered
    with has no place.
    """
    from safetensors import safe_open

    grids = json.loads((checkpoint / DESCRIPTION).read_text())["grids"]
    named, bits = places(model, grids), {name: int(grid.removeprefix("int").split("-")[0]) for name, grid in grids.items()}
    unused = set(grids)
    with safe_open(checkpoint / QUANTIZED, "numpy") as stored:
        for node in [node for node in graph.get_ops() if node.get_type_name() == "Constant"]:
            name, turned = named.get(digest(node), ("", False))
            if name:
                weight = rounded(name, bits[name], stored.get_tensor(f"{name}.q"), stored.get_tensor(f"{name}.scales"))
                replace(node, weight, turned=turned)
                unused.discard(name)
    if lost := unused - idle(model, sorted(unused)):
        raise KeyError(f"the graph has no place for the quantized weight {min(lost)}")
    graph.validate_nodes_and_infer_types()


def idle(model: Any, names: list[str]) -> set[str]:
    """Of these weights, those that no answer to a text depends on: a decoder's to its encoder, LUKE's for entities."""
    import torch

    if not names:
        return set()
    with torch.enable_grad():
        weights = [model.get_parameter(name).requires_grad_() for name in names]
        answer = model(input_ids=torch.full((1, NEW), 5))[0]
        slopes = torch.autograd.grad(answer.sum(), weights, allow_unused=True)
    return {name for name, slope in zip(names, slopes, strict=True) if slope is None}


def places(model: Any, names: Iterable[str]) -> dict[bytes, tuple[str, bool]]:
    """Of the bytes of each weight that lies on a grid: its name, and whether they hold a row of it in each column."""
    found: dict[bytes, tuple[str, bool]] = {}
    for name in names:
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        weight, turned = getattr(module, last).detach().numpy(), type(module).__name__ == "Conv1D"
        for array, other in ((weight, turned), (weight.T, not turned)):
            found.setdefault(blake2b(array.tobytes(), key=str(array.shape).encode()).digest(), (name, other))
    return found


def digest(node: Any) -> bytes:
    """Of a constant's bytes where it is a matrix of floats; empty where it is none."""
    shape = tuple(node.get_output_shape(0))
    if len(shape) != 2 or node.get_element_type().get_type_name() != "f32":
        return b""
    return blake2b(node.data.tobytes(), key=str(shape).encode()).digest()


def rounded(name: str, bits: int, q: Any, scales: Any) -> Any:
    """float32 [rows, columns] as OpenVINO decompresses it: integers times a scale for each row, or for each group of columns."""
    import numpy
    import openvino
    from openvino import opset13 as ops

    (rows, columns), groups = q.shape, scales.shape[1]
    shape = [rows, columns] if groups == 1 else [rows, groups, columns // groups]
    if bits == 4:
        pairs = (q.reshape(-1, 2) & 15).astype(numpy.uint8)
        held = openvino.Tensor(openvino.Type.i4, openvino.Shape(shape))
        held.data.reshape(-1)[:] = (pairs[:, 0] | pairs[:, 1] << 4).view(held.data.dtype)
        integers = openvino.op.Constant(held)
    else:
        integers = ops.constant(q.reshape(shape))
    integers.set_friendly_name(f"{name}.q")
    factors = ops.constant(scales.reshape([rows, *[1] * (len(shape) - 1)] if groups == 1 else [rows, groups, 1]))
    product = ops.multiply(ops.convert(integers, "f32"), factors)
    whole = product if groups == 1 else ops.reshape(product, ops.constant([rows, columns], dtype=numpy.int64), special_zero=False)
    whole.set_friendly_name(name)
    return whole


def replace(node: Any, weight: Any, *, turned: bool) -> None:
    """Let all that reads a constant read `weight` [rows, columns]; products read it as it is stored, a row for each output."""
    import numpy
    from openvino import opset13 as ops

    for reader in list(node.output(0).get_target_inputs()):
        product = reader.get_node()
        if not turned:
            reader.replace_source_output(weight.output(0))
        elif product.get_type_name() == "MatMul" and reader.get_index() == 1:
            told = product.get_attributes()
            left = product.input_value(0)
            by_rows = ops.matmul(left, weight, told["transpose_a"], not told["transpose_b"])
            by_rows.set_friendly_name(product.get_friendly_name())
            product.output(0).replace(by_rows.output(0))
        else:
            reader.replace_source_output(ops.transpose(weight, ops.constant([1, 0], dtype=numpy.int64)).output(0))


if __name__ == "__main__":
    sys.exit(main())
