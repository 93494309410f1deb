"""Packing quantized weights into graphs of ONNX Runtime, without a second rounding.

A graph is built in float32 first, by GenAI's model builder or by Optimum. Then every MatMul, or Gemm, whose weight is quantized
becomes a MatMulNBits that holds the very integers and scales of the checkpoint, and the embedding becomes a GatherBlockQuantized
that shares the output head's storage where the two are tied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from featherweight.grid import Grid
from featherweight.runtimes.packing import Packable, QuantizedRows
from featherweight.store.mapped import give_back

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

    from featherweight.runtimes.torch.linear import InputRange

Activations = Literal["blocks", "dynamic", "static"]
"""What activations are rounded to int8 by: blocks of a row, one range for all that a product is given, or one fixed before."""
MODEL = "model.onnx"
DATA = "model.onnx.data"
WRITING = "writing.onnx"
"""The graph of the same weights that texts are written by: of a prompt it computes the last position's logits alone."""
LOGITS = "logits"
HEADS = ("MatMul", "MatMulNBits")
CONTRIB = "com.microsoft"
FLOAT_ACTIVATIONS = 1
"""MatMulNBits' accuracy_level that computes in float32."""
INT8_ACTIVATIONS = 4
"""The one that rounds activations to int8, block by block: 2 to 50 times as fast."""
PRODUCTS = {"DynamicQuantizeMatMul": (1, 2, 3), "MatMulIntegerToFloat": (1, 3, 5)}
"""Operators that multiply by ranges, and which of their inputs are integers, scales and zero points of the weights."""
UNSIGNED = 128
"""What is added to signed integers to store them unsigned: their zero point."""
# Shape inference reads small tensors such as the target of a Reshape, and cannot when they lie in the data file.
SMALL_BYTES = 1024


@dataclass(frozen=True)
class Products:
    """How products of integers are made.

    ranges: of the inputs of layers by their path, where they are fixed. signed: whether a product by ranges is given signed
    weights. Without VNNI its kernel adds pairs of such products in int16, which cuts off what does not fit; that of unsigned ones,
    which is slower, does not. accuracy_level: MatMulNBits', see INT8_ACTIVATIONS.
    """

    activations: Activations = "blocks"
    signed: bool = True
    ranges: Mapping[str, InputRange] = field(default_factory=dict)
    accuracy_level: int = INT8_ACTIVATIONS


def pack(built: Path, out: Path, rows: QuantizedRows, how: Products = Products()) -> None:
    """Write the float32 decoder in `built` to `out` with quantized weights wherever `rows` knows them, multiplied as `how` says.

    Raises StageError where a quantized weight has no place in the graph, or would share a matrix with one on another grid.
    """
    import onnx_ir

    model = onnx_ir.load(built / MODEL)
    pack_graph(model, rows, how)
    rows.require_all_used("ONNX Runtime GenAI")
    onnx_ir.save(model, out / MODEL, external_data=DATA, size_threshold_bytes=SMALL_BYTES)


def pack_graph(model: ir.Model, rows: QuantizedRows, how: Products = Products()) -> None:
    """Quantized weights in the place of float ones wherever `rows` knows them, in place. Raises StageError, see `pack`."""
    model.opset_imports.setdefault(CONTRIB, 1)
    packer, graph = _Packer(model.graph, rows, how), model.graph
    nodes = list(graph)
    for node in nodes:
        if node.op_type == "Gather":
            packer.replace_gather(node)
    for node in nodes:
        if node.op_type == "MatMul":
            packer.replace_matmul(node)
        elif node.op_type == "Gemm":
            packer.replace_gemm(node)
    _drop_unused(graph)


def in_float(path: Path, out: Path) -> None:
    """Write the graph at `path` to `out` with products of float activations; the weights stay in the data file beside `path`."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    clipped = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Clip"}
    floats = {node.output[0]: clipped[node.input[0]] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    nodes = [made for node in model.graph.node for made in _float_nodes(node, floats)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, out)


def last_logits(path: Path, out: Path) -> bool:
    """Write the decoder at `path` to `out` with logits of the last position alone; the weights stay in the data file beside `path`.

    What the head multiplies is cut to that position: the vocabulary is the widest product of all. False, and nothing written, where
    the head is not found.
    """
    import onnx
    from onnx import TensorProto, helper

    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    head = _head(graph)
    if head is None:
        return False
    place = next(index for index, node in enumerate(graph.node) if node is head)
    names = [f"writing.{name}" for name in ("last", "first_axis", "row", "rows")]
    last, axes, row, rows = names
    graph.initializer.append(helper.make_tensor(last, TensorProto.INT64, [], [-1]))
    graph.initializer.append(helper.make_tensor(axes, TensorProto.INT64, [1], [1]))
    cut = [helper.make_node("Gather", [head.input[0], last], [row], axis=1), helper.make_node("Unsqueeze", [row, axes], [rows])]
    head.input[0] = rows
    for at, node in enumerate(cut):
        graph.node.insert(place + at, node)
    for output in graph.output:
        if output.name == LOGITS:
            output.type.tensor_type.shape.dim[1].dim_value = 1
    outputs = _behind(graph, head)
    stale = [one for one in graph.value_info if one.name in outputs]
    for one in stale:
        graph.value_info.remove(one)
    onnx.save(model, out)
    return True


def _head(graph: Any) -> Any:
    """The product that makes the logits, found upwards from them through what is done to each number by itself."""
    makers = {name: node for node in graph.node for name in node.output}
    stored, node = {one.name for one in graph.initializer}, makers.get(LOGITS)
    while node is not None and node.op_type not in HEADS:
        above = [name for name in node.input if name and name not in stored and name in makers and not _is_fixed(makers[name])]
        node = makers[above[0]] if len(above) == 1 else None
    return node


def _is_fixed(node: Any) -> bool:
    return node.op_type == "Constant"


def _behind(graph: Any, head: Any) -> set[str]:
    """The outputs of a node and of all that is computed of them, whose sizes change with its own."""
    found = set(head.output)
    for node in graph.node:  # in the order in which they are computed
        if found & set(node.input):
            found |= set(node.output)
    return found


def _float_nodes(node: Any, floats: Mapping[str, str]) -> Iterator[Any]:
    """What computes in float what a node of a graph computes in integers; others as they are. floats: by what it was rounded to."""
    from onnx import TensorProto, helper

    if node.op_type in PRODUCTS:
        # Not DequantizeLinear, which ONNX Runtime fuses with the product into one of integers again.
        floats_of = [f"{node.output[0]}.float{place}" for place in range(3)]
        for place, name in zip(PRODUCTS[node.op_type], floats_of, strict=True):
            yield helper.make_node("Cast", [node.input[place]], [name], to=TensorProto.FLOAT)
        q, scales, zero = floats_of
        yield helper.make_node("Sub", [q, zero], [f"{q}.steps"])
        yield helper.make_node("Mul", [f"{q}.steps", scales], [f"{q}.weight"])
        yield helper.make_node("MatMul", [floats.get(node.input[0], node.input[0]), f"{q}.weight"], node.output)
        return
    for attribute in node.attribute:
        if attribute.name == "accuracy_level":
            attribute.i = FLOAT_ACTIVATIONS
    yield node


def block_size(grid: Grid, columns: int) -> int:
    """Weights per block: the grid's group; for one scale per row 64 where that divides the row, else 32.

    Larger blocks are a little faster still, but activations are rounded block by block and lose more in larger ones.
    """
    return grid.group_size or (64 if columns % 64 == 0 else 32)


def pack_blocks(matrix: Packable) -> tuple[Tensor, Tensor]:
    """(uint8 [rows, blocks, block_size * bits / 8], float32 [rows, blocks]) as MatMulNBits reads them.

    Integers are stored with an offset of 2^(bits - 1), the operator's zero point where none is given; two 4-bit integers, or four
    2-bit ones, share a byte, the earlier in the lower bits. A scale per row is repeated over its blocks, and a short last block is
    padded with zeros.
    """
    import torch

    (q, scales), bits, (rows, columns) = matrix.read(), matrix.grid.bits, matrix.shape
    size = block_size(matrix.grid, columns)
    blocks = -(-columns // size)
    stored = torch.nn.functional.pad(q.view(torch.uint8), (0, blocks * size - columns)).view(rows, blocks, size)
    stored = stored + (1 << (bits - 1))  # modulo 256, which is two's complement to offset binary
    share = 8 // bits
    packed = stored[..., ::share].clone()
    for place in range(1, share):
        packed |= stored[..., place::share] << bits * place
    return packed, scales.float().expand(rows, blocks).contiguous()


class _Packer:
    """One pass over a graph: a matrix that two operators read is packed once."""

    def __init__(self, graph: ir.Graph, rows: QuantizedRows, how: Products) -> None:
        self.graph = graph
        self.rows = rows
        self.how = how
        self.packed: dict[tuple[Any, ...], tuple[ir.Value, ir.Value]] = {}

    def replace_matmul(self, node: ir.Node) -> None:
        """MatMul with a constant [columns, rows] on its right becomes a product of integers."""
        if nodes := self._product(node, transposed=True):
            self._swap(node, *nodes)

    def replace_gemm(self, node: ir.Node) -> None:
        """Gemm with a constant on its right, as of a Conv1D or of rows that lie flat, becomes a product of integers and a sum.

        One that scales its terms, or turns its left side, stays as it is.
        """
        import onnx_ir

        told = {"transA": 0, "transB": 0, "alpha": 1.0, "beta": 1.0, **{name: one.value for name, one in node.attributes.items()}}
        if (told["transA"], told["alpha"], told["beta"]) != (0, 1.0, 1.0):
            return
        if nodes := self._product(node, transposed=not told["transB"]):
            sums = [onnx_ir.node("Add", [nodes[-1].outputs[0], term], name=f"{node.name}/Add") for term in node.inputs[2:] if term]
            self._swap(node, *nodes, *sums)

    def _product(self, node: ir.Node, *, transposed: bool) -> list[ir.Node]:
        """What multiplies by the integers of a node's constant, which is [rows, columns] or `transposed`; nothing for another.

        By blocks whatever is asked for: an output head that is the embedding as well, and what has no range where they are fixed.
        """
        weight = node.inputs[1]
        matrix = self._find(_constant(weight, transposed=transposed))
        if matrix is None or weight is None:
            return []
        by, fixed = self.how.activations, [self.how.ranges.get(name.removesuffix(".weight")) for name in matrix.names]
        if by == "blocks" or _key(matrix) in self.packed or (by == "static" and None in fixed):
            return [self._by_blocks(node, weight, matrix)]
        if by == "dynamic":
            return [self._contrib("DynamicQuantizeMatMul", [node.inputs[0], *self._columns(weight, matrix)], node)]
        return list(self._by_fixed_range(node, self._columns(weight, matrix), fixed[0]))

    def _by_blocks(self, node: ir.Node, weight: ir.Value, matrix: Packable) -> ir.Node:
        (rows, columns), attributes = matrix.shape, _layout(matrix)
        attributes |= {"K": columns, "N": rows, "accuracy_level": self.how.accuracy_level}
        return self._contrib("MatMulNBits", [node.inputs[0], *self._store(weight, matrix)], node, attributes)

    def _by_fixed_range(self, node: ir.Node, stored: list[ir.Value], here: Any) -> Iterator[ir.Node]:
        """The input clipped to its range, rounded, and multiplied."""
        import numpy
        import onnx_ir

        ends = [numpy.float32((end - here.zero_point) * here.scale) for end in (0, here.most)]
        told = {"low": ends[0], "high": ends[1], "scale": numpy.float32(here.scale), "zero": numpy.uint8(here.zero_point)}
        stored_as = {name: onnx_ir.tensor(numpy.asarray(value)) for name, value in told.items()}
        low, high, scale, zero = (self._register(f"{node.name}/{name}", value) for name, value in stored_as.items())
        clipped = onnx_ir.node("Clip", [node.inputs[0], low, high], name=f"{node.name}/Clip")
        rounded = onnx_ir.node("QuantizeLinear", [clipped.outputs[0], scale, zero], name=f"{node.name}/Quantize")
        q, scales, offset = stored
        yield from (clipped, rounded)
        yield self._contrib("MatMulIntegerToFloat", [rounded.outputs[0], q, scale, scales, zero, offset], node)

    def _columns(self, weight: ir.Value, matrix: Packable) -> list[ir.Value]:
        """Integers [columns, rows], scales and zero points [rows], as products by ranges read them."""
        import numpy
        import onnx_ir

        q, scales = matrix.read()
        offset = 0 if self.how.signed else UNSIGNED
        turned = (q.numpy().astype(numpy.int16).T + offset).astype(numpy.uint8 if offset else numpy.int8, order="C")
        stored = {"q": turned, "scales": scales.float().numpy().reshape(-1), "zero": numpy.full(len(q), offset, turned.dtype)}
        return [self._register(f"{weight.name}.{name}", onnx_ir.tensor(array)) for name, array in stored.items()]

    def _contrib(self, kind: str, inputs: Any, old: ir.Node, attributes: dict[str, Any] | None = None) -> ir.Node:
        import onnx_ir

        return onnx_ir.node(kind, inputs, attributes or {}, domain=CONTRIB, name=f"{old.name}/{kind}")

    def replace_gather(self, node: ir.Node) -> None:
        """Gather from an embedding [rows, columns], or from the transpose of a head, becomes GatherBlockQuantized."""
        import onnx_ir

        source = node.inputs[0]
        turned = source is not None and (producer := source.producer()) is not None and producer.op_type == "Transpose"
        weight = producer.inputs[0] if turned else source  # type: ignore[union-attr]
        matrix = self._find(_constant(weight, transposed=turned))
        if matrix is None or weight is None:
            return
        q, scales = self._store(weight, matrix)
        (rows, columns), attributes = matrix.shape, _layout(matrix)
        padded = -(-columns // attributes["block_size"]) * attributes["block_size"]
        flat = self._integers(f"{node.name}/shape", [rows, padded * matrix.grid.bits // 8])
        reshape = onnx_ir.node("Reshape", [q, flat], name=f"{node.name}/Reshape")
        attributes |= {"gather_axis": 0, "quantize_axis": 1}
        inputs = [reshape.outputs[0], node.inputs[1], scales]
        nodes = [reshape, onnx_ir.node("GatherBlockQuantized", inputs, attributes, domain=CONTRIB, name=f"{node.name}NBits")]
        if padded != columns:
            bounds = {"start": 0, "end": columns, "axis": -1}
            ends = [self._integers(f"{node.name}/{name}", [value]) for name, value in bounds.items()]
            nodes.append(onnx_ir.node("Slice", [nodes[-1].outputs[0], *ends], name=f"{node.name}/Slice"))
        self._swap(node, *nodes)

    def _find(self, matrix: Tensor | None) -> Packable | None:
        return None if matrix is None else self.rows.find(matrix)

    def _store(self, weight: ir.Value, matrix: Packable) -> tuple[ir.Value, ir.Value]:
        """The initializers (integers, scales) of a matrix, those of an equal one where the graph has them already."""
        key = _key(matrix)
        if key not in self.packed:
            self.packed[key] = (self._deferred(f"{weight.name}.q", matrix, 0), self._deferred(f"{weight.name}.scales", matrix, 1))
        return self.packed[key]

    def _deferred(self, name: str, matrix: Packable, which: int) -> ir.Value:
        """The initializer of the integers (0) or the scales (1) of a matrix, which are made when they are written."""
        import onnx_ir

        packed = pack_blocks(matrix)[which]
        dtype = onnx_ir.DataType.from_numpy(packed.numpy().dtype)
        made = onnx_ir.LazyTensor(
            lambda: onnx_ir.tensor(pack_blocks(matrix)[which].numpy(), name=name), dtype, onnx_ir.Shape(packed.shape), name=name
        )
        return self._register(name, made)

    def _integers(self, name: str, values: list[int]) -> ir.Value:
        import numpy
        import onnx_ir

        return self._register(name, onnx_ir.tensor(numpy.array(values, dtype=numpy.int64), name=name))

    def _register(self, name: str, tensor: Any) -> ir.Value:
        import onnx_ir

        value = onnx_ir.val(name, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def _swap(self, old: ir.Node, *new: ir.Node) -> None:
        """Put `new` in `old`'s place; the last of them takes over its output."""
        import onnx_ir

        onnx_ir.convenience.replace_nodes_and_values(self.graph, old, [old], list(new), old.outputs, new[-1].outputs)


def _key(matrix: Packable) -> tuple[Any, ...]:
    """Equal for matrices that are stored alike."""
    return (*matrix.digest, matrix.grid.bits, block_size(matrix.grid, matrix.shape[1]))


def _layout(matrix: Packable) -> dict[str, Any]:
    return {"bits": matrix.grid.bits, "block_size": block_size(matrix.grid, matrix.shape[1])}


def _constant(value: ir.Value | None, *, transposed: bool) -> Tensor | None:
    """The float matrix [rows, columns] behind a graph's value; None where it is computed, or is no matrix of floats."""
    import numpy
    import torch

    if value is None or value.const_value is None:
        return None
    array = value.const_value.numpy()
    if array.ndim != 2 or array.dtype != numpy.float32:
        return None
    copied = torch.from_numpy(numpy.array(array.T if transposed else array, order="C"))
    give_back(array)
    return copied


def _drop_unused(graph: ir.Graph) -> None:
    """Remove what the float weights leave behind: the transposed view of a tied head, and the weights themselves."""
    for node in list(graph):
        if node.op_type == "Transpose" and not any(output.uses() or output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
