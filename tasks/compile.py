"""compile: a checkpoint becomes what ONNX Runtime GenAI or torch.compile serves, and is checked against PyTorch."""

from __future__ import annotations

import shutil
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.checkpoint.files import copy_tokenizer, link, link_checkpoint
from featherweight.errors import RecipeError, StageError
from featherweight.grid import GRIDS
from featherweight.model.matrices import move_to_grid, round_to_nearest
from featherweight.model.quantized_weights import QuantizedWeights
from featherweight.model.surgery import head_dim
from featherweight.progress import Metrics, Progress
from featherweight.recipe.refusals import grid_refusal
from featherweight.runtimes.onnx_genai import pack
from featherweight.runtimes.packing import QuantizedRows
from featherweight.runtimes.parity import EXACT, Reference, load_reference
from featherweight.runtimes.spec import CompileSpec
from featherweight.store.served_folder import Serving
from tasks.stage import stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROUNDED_HERE = {"int8": ("int8", "int8"), "int4": ("int4-g32", "int4-g32")}
"""Grids of the body and of the head, by precision, where no quantize stage chose them."""
HEAD_MULTIPLE = 16


@stage("compile", version="2", libraries=("onnxruntime-genai", "onnxruntime", "torch", "transformers"), hardware=True)
def compile(
    spec: CompileSpec, *, checkpoint: Path, calibration: Path, out: Path, seed: int = 0, progress: Progress = Progress()
) -> Metrics:
    """Write to `out` what `spec.engine` serves.

    Quantized weights of the checkpoint reach ONNX Runtime as they are; float ones are rounded to nearest where
    `spec.precision` says so. Metrics: `parity_max_abs`, `parity_mean_abs`, `parity_bound` (nats, see runtimes.parity), and for
    quantized weights `parity_weights_max_abs`, the same with activations in float.
    Raises RecipeError for weights on a grid that the engine does not hold, StageError for an unknown architecture, ParityError
    where the engine does not compute what PyTorch computes.
    """
    quantized = QuantizedWeights.read(checkpoint)
    refuse(quantized, spec)
    if spec.engine == "torch-compile":
        return _link_torch(checkpoint, calibration, out, progress)
    model = load_reference(checkpoint)
    require_head_width(model)
    if quantized is None and spec.precision != "float32":
        quantized = round_to_nearest(model, *(GRIDS[name] for name in ROUNDED_HERE[spec.precision]))
    rows = QuantizedRows.of(model, quantized) if quantized else None
    progress.note("building the ONNX graph")
    _write_genai(checkpoint, out, rows)
    copy_tokenizer(checkpoint, out)
    if quantized:
        move_to_grid(model, quantized)
    Serving("onnxruntime-genai", grid=quantized.grid if quantized else None).write(out)
    reference = Reference.of(model, checkpoint, calibration)
    del model, rows
    progress.note("comparing onnxruntime-genai with PyTorch")
    weights = _check_weights(reference, out) if quantized else {}
    return {**weights, **reference.check(out)}


def refuse(quantized: QuantizedWeights | None, spec: CompileSpec) -> None:
    """Raise RecipeError where the engine does not hold the grids of these weights."""
    body, head = (quantized.grid, quantized.head) if quantized else (None, None)
    reason = grid_refusal(GRIDS[body] if body else None, GRIDS[head] if head else None, spec)
    if reason:
        raise RecipeError(f"{body or 'float'} + {spec.engine}: {reason}")


def require_head_width(model: PreTrainedModel) -> None:
    """Raise StageError where ONNX Runtime's attention kernel would refuse the heads, which it does only when it runs."""
    width = head_dim(model.config)
    if width % HEAD_MULTIPLE:
        raise StageError(
            f"onnxruntime-genai wants attention heads of a multiple of {HEAD_MULTIPLE} channels, these have {width}; "
            "serve the model with ctranslate2 or vllm"
        )


def _link_torch(checkpoint: Path, calibration: Path, out: Path, progress: Progress) -> Metrics:
    link_checkpoint(checkpoint, out)
    Serving("torch-compile").write(out)
    reference = Reference.of(load_reference(checkpoint), checkpoint, calibration)
    progress.note("comparing torch-compile with PyTorch")
    return reference.check(out)


def _write_genai(checkpoint: Path, out: Path, rows: QuantizedRows | None) -> None:
    """The decoder graph with its weights, and genai_config.json."""
    if rows is None:
        build_decoder(checkpoint, out)
        return
    built = out / "float32"
    built.mkdir()
    build_decoder(checkpoint, built, fuse_qkv=_one_grid_per_attention(rows.quantized))
    pack.pack(built, out, rows)
    shutil.move(built / "genai_config.json", out)
    shutil.rmtree(built)


def build_decoder(checkpoint: Path, out: Path, *, fuse_qkv: bool = True) -> None:
    """GenAI's model builder, in this process: the float32 decoder graph, genai_config.json and a tokenizer, in `out`.

    Raises StageError for an architecture that it does not know.
    """
    import onnxruntime_genai.models  # noqa: F401 - puts the builder's folder on the path, where it looks for its parts
    from onnxruntime_genai.models import builder

    _silence_builder()
    # It writes the commit of whatever repository its environment lies in into the graph: the same weights, other bytes.
    sys.modules["builders.base"].Model.get_genai_commit = lambda: None
    cache = out / "cache"
    options = ["hf_token=false", f"fuse_qkv={str(fuse_qkv).lower()}"]
    arguments = ("", str(checkpoint), str(out), "fp32", "cpu", str(cache))
    try:
        builder.create_model(*arguments, **builder.parse_extra_options(*arguments, options))
    except NotImplementedError as error:
        raise StageError(
            f"onnxruntime-genai's model builder does not know the architecture in {checkpoint.name}; "
            "serve the model with ctranslate2 or vllm"
        ) from error
    shutil.rmtree(cache, ignore_errors=True)


def _silence_builder() -> None:
    """The builder prints its every step; to redirect stdout would also swallow what other threads print."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "builders" or name == "onnxruntime_genai.models.builder":
            vars(module)["print"] = lambda *_, **__: None
            if hasattr(module, "tqdm"):
                vars(module)["tqdm"] = partial(module.tqdm, disable=True)


def _one_grid_per_attention(quantized: QuantizedWeights) -> bool:
    """Whether the query, key and value matrices of every layer can be one matrix in the graph."""
    by_layer: dict[str, set[str]] = {}
    for name, grid in quantized.grids.items():
        layer, _, module = name.removesuffix(".weight").rpartition(".")
        if module in ("q_proj", "k_proj", "v_proj"):
            by_layer.setdefault(layer, set()).add(grid.name)
    return all(len(grids) == 1 for grids in by_layer.values())


def _check_weights(reference: Reference, served: Path) -> Metrics:
    """Hold the packed weights to the exact bound, with a twin of the graph that leaves activations in float."""
    twin = served / "twin"
    twin.mkdir()
    pack.set_accuracy_level(served / pack.MODEL, twin / pack.MODEL, pack.FLOAT_ACTIVATIONS)
    for path in served.iterdir():
        if path.is_file() and path.name != pack.MODEL:
            link(path, twin / path.name)
    measured = reference.check(twin, EXACT)
    shutil.rmtree(twin)
    return {"parity_weights_max_abs": measured["parity_max_abs"]}
