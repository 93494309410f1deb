"""What a recipe says of the engines that serve."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import model_validator

from featherweight.spec import ComputeType, Spec, TorchEngine


class CompileSpec(Spec):
    """ONNX Runtime GenAI, or torch.compile. `precision` rounds here only where no quantize stage chose the weights."""

    engine: Literal["onnxruntime-genai", "torch-compile"]
    precision: Literal["float32", "int8", "int4"] = "float32"


class ExportSpec(Spec):
    """CTranslate2, vLLM, the plain PyTorch folder, or PyTorch with quantized layers: torch's own, or torchao's.

    compute_type, for CTranslate2: float32, int8, int8_float32, or on CUDA int8_float16, bfloat16, float16; for vLLM: float32,
    bfloat16, float16, w8a8 (or int8), w8a16, w4a16, fp8; for torch: the three floats, or on CUDA bitsandbytes' nf4 and llm.int8.
    reduce_range: 'auto' means where the CPU has no VNNI; CTranslate2's int8 only.
    kv_cache: what vLLM keeps keys and values in, null for its own float.
    """

    engine: Literal["ctranslate2", "vllm", "torch", TorchEngine]
    compute_type: ComputeType = "float32"
    reduce_range: bool | Literal["auto"] = "auto"
    kv_cache: Literal["fp8"] | None = None

    @property
    def unread(self) -> dict[str, str]:
        cases = (("compute_type", self.engine in get_args(TorchEngine)), ("reduce_range", self.engine != "ctranslate2"))
        return {key: f"with engine {self.engine}" for key, holds in cases if holds}

    @model_validator(mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        """vLLM's w8a8 is what int8 means there."""
        if isinstance(value, dict) and value.get("compute_type") == "w8a8":
            return value | {"compute_type": "int8"}
        return value
