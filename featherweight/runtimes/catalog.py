"""The catalog of runtimes. A new engine is a file or a folder, and one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from featherweight.catalog import Catalog

if TYPE_CHECKING:
    from featherweight.runtimes.interface import Runtime

RUNTIMES: Catalog[Runtime] = Catalog(
    "engine",
    "featherweight.runtimes",
    {
        "torch": "featherweight.runtimes.torch.runtime:TORCH",
        "torch-compile": "featherweight.runtimes.torch.runtime:TORCH_COMPILE",
        "torch-aoti": "featherweight.runtimes.torch_aoti.runtime:TORCH_AOTI",
        "torchscript": "featherweight.runtimes.torchscript.runtime:TORCHSCRIPT",
        "torch-dynamic": "featherweight.runtimes.torch.quantized_runtime:TORCH_DYNAMIC",
        "torch-static": "featherweight.runtimes.torch.quantized_runtime:TORCH_STATIC",
        "torchao-int8": "featherweight.runtimes.torch.quantized_runtime:TORCHAO_INT8",
        "torchao-int4": "featherweight.runtimes.torch.quantized_runtime:TORCHAO_INT4",
        "torchao-int8-dynamic": "featherweight.runtimes.torch.quantized_runtime:TORCHAO_INT8_DYNAMIC",
        "onnxruntime": "featherweight.runtimes.optimum.runtime:OPTIMUM",
        "onnxruntime-genai": "featherweight.runtimes.onnx_genai.runtime:ONNXRUNTIME_GENAI",
        "ctranslate2": "featherweight.runtimes.ctranslate2.runtime:CTRANSLATE2",
        "llama.cpp": "featherweight.runtimes.llama_cpp.runtime:LLAMA_CPP",
        "tvm": "featherweight.runtimes.tvm.runtime:TVM",
        "openvino": "featherweight.runtimes.openvino.runtime:OPENVINO",
        "vllm": "featherweight.runtimes.vllm.runtime:VLLM",
    },
)
BASELINE = "torch"
"""What every variant is compared with: the checkpoint in PyTorch, in float32."""
