"""Writing the folder that ONNX Runtime GenAI serves: the decoder's graph, its description and the tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.checkpoint.files import link
from featherweight.checkpoint.opening import load_config
from featherweight.checkpoint.saving import copy_tokenizer
from featherweight.errors import StageError
from featherweight.grid import GRIDS
from featherweight.model.matrices import round_to_nearest
from featherweight.model.quantized_weights import QuantizedWeights
from featherweight.progress import Metrics
from featherweight.runtimes.bounds import EXACT
from featherweight.runtimes.onnx import pack
from featherweight.runtimes.onnx_genai import patches
from featherweight.runtimes.packing import QuantizedRows
from featherweight.store.mapped import give_back
from featherweight.store.served_folder import Serving
from featherweight.system.device import CPU, Device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from featherweight.runtimes.onnx_genai.runtime import GenaiSpec
    from featherweight.runtimes.parity import Reference
    from featherweight.runtimes.writing import Source

ROUNDED_HERE = {"int8": ("int8", "int8"), "int4": ("int4-g32", "int4-g32")}
"""Grids of the body and of the head, by precision, where no quantize stage chose them."""


def write(spec: GenaiSpec, source: Source, out: Path) -> None:
    """See Runtime.write. The graph is built from the checkpoint's own floats, so their rows are sought, and rounded after that."""
    if source.quantized is None and spec.precision != "float32":
        body, head = (GRIDS[name] for name in ROUNDED_HERE[spec.precision])
        source.quantized = round_to_nearest(source.model, body, head, source.room)
    rows = QuantizedRows.of(source.model, source.quantized) if source.quantized else None
    _write_graph(source, out, rows, pack.Products(accuracy_level=spec.accuracy_level))
    pack.last_logits(out / pack.MODEL, out / pack.WRITING)
    copy_tokenizer(source.checkpoint, out)
    if source.quantized:
        source.move_to_grid()
    options = {"activations": "float32"} if spec.accuracy_level == pack.FLOAT_ACTIVATIONS else {}
    Serving("onnxruntime-genai", options=options, grid=source.grid).write(out)


def _write_graph(source: Source, out: Path, rows: QuantizedRows | None, how: pack.Products) -> None:
    """The decoder graph with its weights, and genai_config.json."""
    if rows is None:
        build_decoder(source.checkpoint, out, device=source.device, model=source.model)
        return
    built = out / "float32"
    built.mkdir()
    fused = _one_grid_per_attention(rows.quantized)
    build_decoder(source.checkpoint, built, fuse_qkv=fused, device=source.device, model=source.model)
    pack.pack(built, out, rows, how)
    shutil.move(built / "genai_config.json", out)
    shutil.rmtree(built)


def build_decoder(
    checkpoint: Path, out: Path, *, fuse_qkv: bool = True, device: Device = CPU, model: PreTrainedModel | None = None
) -> None:
    """GenAI's model builder, in this process: the float32 decoder graph, genai_config.json and a tokenizer, in `out`.

    device: the execution provider that genai_config.json names. model: has the weights; by default the builder loads them.

    Raises StageError for an architecture that it does not know, or of which it does not find what it expects.
    """
    import onnxruntime_genai.models  # noqa: F401 - puts the builder's folder on the path, where it looks for its parts
    from onnxruntime_genai.models import builder

    patches.silent()
    patches.without_commit()
    patches.mend()
    cache = out / "cache"
    # A cache of a window's size has no room for the tokens that a sliding layer still sees while a longer prompt is read.
    options = ["hf_token=false", f"fuse_qkv={str(fuse_qkv).lower()}", "windowed_kv_cache=false"]
    arguments = ("", str(checkpoint), str(out), "fp32", device, str(cache))
    try:
        with patches.weights_of(model):
            builder.create_model(*arguments, **builder.parse_extra_options(*arguments, options))
    except NotImplementedError as error:
        raise StageError(_unknown_refusal(checkpoint)) from error
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        kind = load_config(checkpoint).model_type
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise StageError(f"onnxruntime-genai's model builder cannot take this {kind} ({why}); take another engine") from error
    shutil.rmtree(cache, ignore_errors=True)
    for weight in model.parameters() if model is not None else ():
        give_back(weight)


def _unknown_refusal(checkpoint: Path) -> str:
    return (
        f"onnxruntime-genai's model builder does not know the architecture in {checkpoint.name}; "
        "serve the model with ctranslate2 or vllm"
    )


def _one_grid_per_attention(quantized: QuantizedWeights) -> bool:
    """Whether the query, key and value matrices of every layer can be one matrix in the graph."""
    by_layer: dict[str, set[str]] = {}
    for name, grid in quantized.grids.items():
        layer, _, module = name.removesuffix(".weight").rpartition(".")
        if module in ("q_proj", "k_proj", "v_proj"):
            by_layer.setdefault(layer, set()).add(grid.name)
    return all(len(grids) == 1 for grids in by_layer.values())


def check_weights(reference: Reference, served: Path) -> Metrics:
    """Hold the packed weights to the exact bound, with a twin of the graph that leaves activations in float."""
    twin = served / "twin"
    twin.mkdir()
    pack.in_float(served / pack.MODEL, twin / pack.MODEL)
    for path in served.iterdir():
        if path.is_file() and path.name not in (pack.MODEL, pack.WRITING):
            link(path, twin / path.name)
    measured = reference.check(twin, EXACT)
    shutil.rmtree(twin)
    return {"parity_weights_max_abs": measured["parity_max_abs"]}
