"""From torch's exported program to TVM's Relax, and from there to machine code.

Imported by who has opened TVM's toolchain with its compiler (library.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import tvm
from tvm import relax, te
from tvm.relax.frontend.torch import from_exported_program

from featherweight.runtimes.tvm import kernels

if TYPE_CHECKING:
    from torch.export import ExportedProgram
    from torch.fx import Node

UNBOUNDED = "tir_var_upper_bound"
"""TVM would take memory for the largest batch of the longest texts at once."""


def translated(program: ExportedProgram) -> Any:
    """The module of Relax: `main` takes the graph's inputs, then its parameters in their order."""
    module = from_exported_program(
        program,
        keep_params_as_input=True,
        run_ep_decomposition=False,
        unwrap_unit_return_tuple=True,
        custom_convert_map=dict(OPERATORS),
    )
    module["main"] = module["main"].without_attr("params").without_attr(UNBOUNDED)
    return module


def compiled(module: Any, made_for: str) -> Any:
    """Machine code for a level of x86-64; for other CPUs of what the compiler finds here."""
    kind = {"kind": "llvm"} if made_for == "generic" else {"kind": "llvm", "mcpu": made_for}
    return relax.build(module, tvm.target.Target(kind))


def _packed_linear(node: Node, importer: Any) -> Any:
    x, weight, scales, bias = (importer.env[one] for one in node.args[:4])
    (outputs,) = _constants(node, 4)
    _, inputs, width = (int(size) for size in weight.ty.shape)
    *outer, _ = x.ty.shape
    rows = _product(outer)
    emit, kernel = importer.block_builder.emit, kernels.linear(outputs, inputs, width, str(weight.ty.dtype))
    function = importer.block_builder.add_func(kernel, f"linear_{outputs}_{inputs}")
    flat = emit(relax.op.reshape(x, (rows, inputs)))
    found = emit(relax.op.call_tir(function, [flat, weight, scales, bias], relax.TensorType((rows, outputs), "float32")))
    return emit(relax.op.reshape(found, (*outer, outputs)))


def _constants(node: Node, first: int) -> tuple[Any, ...]:
    """Arguments from `first` on, which are numbers of the graph itself."""
    return node.args[first:]


def _product(sizes: Any) -> Any:
    product = 1
    for size in sizes:
        product = product * size
    return product


def _attend(node: Node, importer: Any) -> Any:
    """The cache is written to in the same call, which the graph is not told: its parts come back to the caller by their memory."""
    q, k, v, *cache = (importer.env[one] for one in node.args[:6])
    layer, scale, causal = _constants(node, 6)
    batch, heads, tokens, width = q.ty.shape
    value_width = v.ty.shape[3]
    kernel = kernels.attention(int(heads), int(k.ty.shape[1]), int(width), int(value_width), float(scale), bool(causal))
    function = importer.block_builder.add_func(kernel, "attention")
    out = relax.TensorType((batch, tokens, heads, value_width), "float32")
    return importer.block_builder.emit(relax.op.call_tir(function, [q, k, v, *cache, relax.const(layer, "int64")], out))


def _to(node: Node, importer: Any) -> Any:
    """A move to a device and type; there is one device."""
    kind = next((str(one).removeprefix("torch.") for one in node.args[1:] if str(one).startswith("torch.")), None)
    x = importer.env[node.args[0]]
    return importer.block_builder.emit(relax.op.astype(x, kind)) if kind else x


def _power(node: Node, importer: Any) -> Any:
    """Squares as products: the C library's pow takes a norm's time many times over."""
    x, exponent = importer.env[node.args[0]], node.args[1]
    if exponent == 2:
        return importer.block_builder.emit(relax.op.multiply(x, x))
    return importer.block_builder.emit(relax.op.power(x, relax.const(exponent, x.ty.dtype)))


def _silu(node: Node, importer: Any) -> Any:
    """By a series, which is computed for a vector at once; the C library's exp takes one number after the other."""
    x = importer.env[node.args[0]]

    def silu(a: Any) -> Any:
        return te.compute(a.shape, lambda *at: a(*at) / (1 + kernels.exponential(-a(*at))), name="silu")

    return importer.block_builder.emit_te(silu, x)


OPERATORS: Mapping[str, Callable[[Node, Any], Any]] = {
    "packed_linear.default": _packed_linear,
    "attend.default": _attend,
    "to.device": _to,
    "pow.Tensor_Scalar": _power,
    "silu.default": _silu,
}
