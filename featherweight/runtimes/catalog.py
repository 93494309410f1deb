"""The table of engines. A new runtime is one file and one line here."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

from featherweight.errors import RecipeError, ToolchainError

if TYPE_CHECKING:
    from featherweight.runtimes.interface import LoadedModel

TORCH_QUANTIZED = "torch.quantized:QuantizedTorchModel"
ENGINES = {
    "torch": ("torch.eager:TorchModel", "torch"),
    "torch-compile": ("torch.compiled:CompiledTorchModel", "torch"),
    "torch-dynamic": (TORCH_QUANTIZED, "torch"),
    "torch-static": (TORCH_QUANTIZED, "torchao"),
    "torchao-int8": (TORCH_QUANTIZED, "torchao"),
    "torchao-int4": (TORCH_QUANTIZED, "torchao"),
    "torchao-int8-dynamic": (TORCH_QUANTIZED, "torchao"),
    "onnxruntime-genai": ("onnx_genai.loaded:GenaiModel", "onnxruntime_genai"),
    "ctranslate2": ("ctranslate2.loaded:CTranslate2Model", "ctranslate2"),
    "vllm": ("vllm.loaded:VllmModel", None),
}


def engine_class(name: str) -> type[LoadedModel]:
    """The class of an engine, imported only now; raises RecipeError naming the known ones."""
    if name not in ENGINES:
        raise RecipeError(f"unknown engine '{name}'; known: {', '.join(ENGINES)}")
    module, _, attribute = ENGINES[name][0].partition(":")
    return getattr(import_module(f"featherweight.runtimes.{module}"), attribute)


def engine_available(engine: str) -> str | None:
    """None if this machine can run `engine`, else the reason why not and how to get it."""
    engine_class(engine)
    if engine == "vllm":
        return _vllm_missing()
    library = ENGINES[engine][1]
    if library and find_spec(library) is None:
        return f"{library} is not installed; run 'make setup'"
    if engine == "torch-compile":
        return _compiler_missing()
    return None


def _vllm_missing() -> str | None:
    from featherweight.system.toolchains import python

    try:
        python("vllm")
    except ToolchainError as error:
        return str(error)
    return None


def _compiler_missing() -> str | None:
    """torch.compile writes C++ and needs a compiler for it."""
    import os
    import shutil

    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"torch.compile needs a C++ compiler, and there is no {compiler} on the PATH"
