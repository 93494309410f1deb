"""Which grids an engine holds exactly, and so which combinations of quantize and serve make sense.

All but `machine_refusal` is decided from the recipe alone, and all of it before anything runs. What an engine cannot pack without
a second rounding is refused, and so is what it could only serve at a loss: float32 of rounded weights is neither smaller nor faster
than float32 of the weights before rounding, and worse.
"""

from __future__ import annotations

from importlib.util import find_spec

from featherweight.grid import Grid, grid_named
from featherweight.pruning.spec import PruneSpec
from featherweight.quantization.spec import MixedSpec, QuantizeSpec
from featherweight.runtimes.spec import CompileSpec, ExportSpec
from featherweight.runtimes.vllm.pack import SCHEMES
from featherweight.spec import Task
from featherweight.system.machine import Machine

MATMUL_BLOCKS = (16, 32, 64, 128, 256)
PRECISION_BITS = {"int8": 8, "int4": 4}
BY_ROW = ("torch-dynamic", "torch-static", "torchao-int8-dynamic")
"""PyTorch engines that multiply int8 by int8."""
INTEGERS_ONLY = "it holds integers, not fp8; take vllm"
BITSANDBYTES = ("nf4", "llm.int8")
FLOATS = ("float32", "bfloat16", "float16")
SIXTEEN_BITS = FLOATS[1:]
COMPUTE_TYPES = {
    "ctranslate2": (*FLOATS, "int8", "int8_float32", "int8_float16"),
    "vllm": (*FLOATS, *SCHEMES),
    "torch": (*FLOATS, *BITSANDBYTES),
}
CUDA_ONLY = {"ctranslate2": ("int8_float16", *SIXTEEN_BITS), "torch": BITSANDBYTES}
"""What CTranslate2 would compute in float32 on a CPU, and bitsandbytes not at all."""
NOT_FOR: dict[tuple[str, Task], str] = {
    ("onnxruntime-genai", "text2text-generation"): "its model builder knows decoders only; take ctranslate2 or torch",
    ("onnxruntime-genai", "fill-mask"): "its model builder knows decoders only; take torch or torch-compile",
    ("torch-compile", "text2text-generation"): "only decoders have a compiled step here; take ctranslate2 or torch",
    ("vllm", "text2text-generation"): "vLLM 0.32 runs no T5, mBART or other encoder-decoder on a CPU; take ctranslate2 or torch",
    ("vllm", "fill-mask"): "vLLM serves no masked-language-model head; take torch or torch-compile",
    ("ctranslate2", "fill-mask"): "its encoders end before the masked-language-model head; take torch or torch-compile",
}
"""Engines that do not serve a task, and why."""


def task_refusal(task: Task, serve: CompileSpec | ExportSpec) -> str | None:
    """Why the engine cannot serve a model for `task`, in one line; None where it can."""
    reason = NOT_FOR.get((serve.engine, task))
    return reason and f"{task} + {serve.engine}: {reason}"


def refusal(quantize: QuantizeSpec | None, serve: CompileSpec | ExportSpec) -> str | None:
    """Why `serve` cannot or should not serve what `quantize` makes, in one line; None where it can.

    quantize: None for weights that are still in float.
    """
    if quantize is None:
        return grid_refusal(None, None, serve)
    body, head = grid_named(quantize.grid), grid_named(quantize.head) if quantize.head else None
    reason = grid_refusal(body, head, serve) or (_mixed_refusal(quantize.mixed, head, serve) if quantize.mixed else None)
    return reason and f"{quantize.method}-{quantize.grid} + {serve.engine}: {reason}"


def _mixed_refusal(mixed: MixedSpec, head: Grid | None, serve: CompileSpec | ExportSpec) -> str | None:
    """Why `serve` cannot hold some matrices on a finer grid beside the others."""
    finer = grid_named(mixed.grid)
    if serve.engine == "onnxruntime-genai":
        return _no_matmul_nbits(finer)
    if serve.engine in ("torchao-int8", "torchao-int4"):
        return None if finer.kind == "int" else INTEGERS_ONLY
    if serve.engine in ("ctranslate2", *BY_ROW):
        return grid_refusal(finer, head, serve)
    return f"{serve.engine} is given one grid for all layers here, not mixed precision; take onnxruntime-genai"


def shape_refusal(prune: PruneSpec | None, serve: CompileSpec | ExportSpec) -> str | None:
    """Why `serve` gains nothing from layers of different widths, in one line; None where it does, or they are alike."""
    if prune is None or not prune.uneven or serve.engine == "ctranslate2":
        return None
    return (
        f"prune.scope global + {serve.engine}: it loads layers of one shape, and would serve the narrower ones filled up with "
        "zeros, no smaller and no faster; take ctranslate2, or scope: uniform"
    )


def grid_refusal(body: Grid | None, head: Grid | None, serve: CompileSpec | ExportSpec) -> str | None:
    """The same, for weights whose body and head (embedding and output head) lie on these grids; None for float."""
    if isinstance(serve, CompileSpec):
        rule = _genai if serve.engine == "onnxruntime-genai" else _torch_compile
        return rule(body, head, serve)
    known = COMPUTE_TYPES.get(serve.engine)
    if known and serve.compute_type not in known:
        return f"{serve.engine} serves {', '.join(known)}, not {serve.compute_type}"
    if serve.kv_cache and serve.engine != "vllm":
        return f"kv_cache is vLLM's; {serve.engine} keeps keys and values in float"
    return {"ctranslate2": _ctranslate2, "vllm": _vllm, "torch": _torch}.get(serve.engine, _torch_quantized)(body, head, serve)


def machine_refusal(serve: CompileSpec | ExportSpec, machine: Machine) -> str | None:
    """Why `machine` has no kernel for `serve`, in one line that names what it needs; None where it has, or may have."""
    if isinstance(serve, CompileSpec):
        return None
    if machine.gpus:
        missing = serve.compute_type in BITSANDBYTES and find_spec("bitsandbytes") is None
        return f"{serve.compute_type} needs bitsandbytes, which is not installed; pip install bitsandbytes" if missing else None
    wanted, avx512 = f"{serve.engine} {serve.compute_type}", "avx512f" in machine.cpu_features
    if serve.compute_type in CUDA_ONLY.get(serve.engine, ()):
        return f"{wanted} needs a CUDA GPU, and there is none here; take a CPU type such as int8"
    if serve.compute_type == "w8a16":
        return "W8A16 needs a CUDA GPU: vLLM has no CPU kernel for 8-bit weights with float activations; take int8 (W8A8) or w4a16"
    if serve.compute_type == "w4a16" and not avx512:
        return "W4A16 needs a CUDA GPU or a CPU with AVX-512: vLLM's build for AVX2 has no kernel for it; take int8 (W8A8)"
    if serve.kv_cache and not avx512:
        return "a key-value cache in fp8 needs a CUDA GPU or a CPU with AVX-512 in vLLM; leave kv_cache out"
    return None


def _float_of_rounded(precision: str) -> str:
    return f"{precision} would store rounded weights at full size, no smaller and no faster than unrounded ones"


def _genai(body: Grid | None, head: Grid | None, serve: CompileSpec) -> str | None:
    if body is None:
        return None
    if serve.precision == "float32":
        return _float_of_rounded("float32")
    if body.kind == "float":
        return _no_matmul_nbits(body)
    if PRECISION_BITS[serve.precision] != body.bits:
        return f"the weights are on a {body.bits}-bit grid, and precision {serve.precision} would round them again"
    return next((reason for grid in (body, head) if grid and (reason := _no_matmul_nbits(grid))), None)


def _no_matmul_nbits(grid: Grid) -> str | None:
    """ONNX Runtime's MatMulNBits: 4 or 8 bits, symmetric about zero, one scale per block (a row's scale can be repeated)."""
    if grid.kind == "int" and grid.bits in (4, 8) and (grid.group_size is None or grid.group_size in MATMUL_BLOCKS):
        return None
    return f"MatMulNBits holds 4 and 8 bits in groups of {MATMUL_BLOCKS[0]} to {MATMUL_BLOCKS[-1]} or per row, not {grid.name}"


def _torch_compile(body: Grid | None, head: Grid | None, serve: CompileSpec) -> str | None:
    if serve.precision != "float32":
        return f"torch.compile serves float32 here, not {serve.precision}; take onnxruntime-genai"
    return None if body is None else _float_of_rounded("float32")


def _torch(body: Grid | None, head: Grid | None, serve: ExportSpec) -> str | None:
    if body is None:
        return None
    if serve.compute_type in BITSANDBYTES:
        return f"bitsandbytes rounds weights to {serve.compute_type} itself; give it float ones"
    return _float_of_rounded(serve.compute_type)


def _torch_quantized(body: Grid | None, head: Grid | None, serve: ExportSpec) -> str | None:
    """torch's own int8 layers and torchao's; those that round activations multiply whole rows, so they want one scale per row."""
    if body is None:
        return None
    bits = 4 if serve.engine == "torchao-int4" else 8
    if "float" in (body.kind, head.kind if head else "int"):
        return INTEGERS_ONLY
    if body.bits != bits:
        other = "torchao-int4" if bits == 8 else "torchao-int8"
        return f"it holds {bits}-bit integers, and would round the {body.bits}-bit grid again; take {other}"
    for grid in (body, head):
        if serve.engine in BY_ROW and grid is not None and (grid.bits != 8 or grid.group_size is not None):
            return f"its int8 product has one scale per row of 8-bit weights, not {grid.name}; take torchao-int8"
    return None


def _ctranslate2(body: Grid | None, head: Grid | None, serve: ExportSpec) -> str | None:
    if body is None:
        return None
    if serve.compute_type in FLOATS:
        return _float_of_rounded(serve.compute_type) + "; int8_float32 keeps them at 8 bits on disk"
    for grid in (body, head):
        if grid is not None and (grid.bits != 8 or grid.kind != "int"):
            return "CTranslate2 packs int8 and float only"
        if grid is not None and grid.group_size is not None:
            return f"CTranslate2 packs one scale per row, not one per {grid.group_size} weights"
    if serve.compute_type in ("int8", "int8_float16") and head is None:
        return "CTranslate2 would round the float head to int8 at load; quantize the head too, or take int8_float32"
    if serve.reduce_range is True and serve.compute_type == "int8" and body.qmax > 63:
        return "reduce_range wants weights on the grid int8-reduced, and a second rounding is not done here"
    return None


def _vllm(body: Grid | None, head: Grid | None, serve: ExportSpec) -> str | None:
    if body is None:
        return None
    if serve.compute_type in FLOATS:
        return _float_of_rounded(serve.compute_type)
    scheme = SCHEMES[serve.compute_type]
    return None if scheme.holds(body) else f"compressed-tensors {scheme.name} holds {scheme.weights}, not {body.name}"
