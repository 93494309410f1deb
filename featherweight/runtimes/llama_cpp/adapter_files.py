"""LoRA adapters in llama.cpp's form: a GGUF file of two factors for each matrix, beside the model's own file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.files import ADAPTER_WEIGHTS
from featherweight.checkpoint.kept_adapters import adapted, kept_adapters
from featherweight.runtimes.llama_cpp.tensors import Tensors

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedModel

FILE = "adapter.gguf"
FACTOR_IS_SCALED = 0.0
"""As adapter.lora.alpha: llama.cpp multiplies by alpha / rank, and by nothing where alpha is zero."""


def write_adapters(model: PreTrainedModel, out: Path) -> None:
    """Write each adapter that lies beside the variant in `out` as llama.cpp reads it, in the place of peft's file.

    model: their base, whose class says what the matrices are called. Raises StageError for one that has no place.
    """
    for folder in kept_adapters(out).values():
        _write(model, folder)
        (folder / ADAPTER_WEIGHTS[0]).unlink()


def _write(model: PreTrainedModel, folder: Path) -> None:
    from gguf import GGUFType, GGUFWriter

    tensors = Tensors(model)
    writer = GGUFWriter(folder / FILE, tensors.known.name)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", FACTOR_IS_SCALED)
    with adapted(model, folder) as together:
        _add_factors(writer, tensors, together)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_factors(writer: GGUFWriter, tensors: Tensors, together: PreTrainedModel) -> None:
    """A [rank, columns] and B [rows, rank] of each layer, scaled as peft scales them; rows in llama.cpp's order."""
    from peft.tuners.lora import LoraLayer

    layers: list[tuple[str, Any]] = [(name, one) for name, one in together.named_modules() if isinstance(one, LoraLayer)]
    for name, layer in layers:
        (adapter,) = layer.lora_A
        order = tensors.order(f"{name}.weight")
        first = layer.lora_A[adapter].weight.detach().float().numpy()
        second = (layer.lora_B[adapter].weight * layer.scaling[adapter]).detach().float().numpy()
        writer.add_tensor(f"{tensors.name(f'{name}.weight')}.lora_a", first)
        writer.add_tensor(f"{tensors.name(f'{name}.weight')}.lora_b", second if order is None else second[order])
