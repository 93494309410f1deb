"""export: a checkpoint becomes a folder that CTranslate2, vLLM, PyTorch or torchao serves, and is checked against PyTorch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.checkpoint import opening
from featherweight.checkpoint.files import copy_tokenizer, link, link_checkpoint
from featherweight.checkpoint.opening import load_config
from featherweight.errors import RecipeError, StageError, ToolchainError
from featherweight.grid import GRIDS, Grid
from featherweight.model.matrices import move_to_grid, round_to_nearest
from featherweight.model.padding import without_padding
from featherweight.model.quantized_weights import QuantizedWeights
from featherweight.progress import Metrics, Progress
from featherweight.recipe.refusals import BITSANDBYTES, SIXTEEN_BITS, grid_refusal, machine_refusal
from featherweight.runtimes.ctranslate2 import pack as ctranslate2_pack
from featherweight.runtimes.packing import QuantizedRows
from featherweight.runtimes.parity import EXACT, Reference, load_reference
from featherweight.runtimes.spec import ExportSpec
from featherweight.runtimes.torch import pack as torch_pack
from featherweight.runtimes.torch.static_ranges import input_ranges, simulated
from featherweight.runtimes.vllm import pack as vllm_pack
from featherweight.store.served_folder import Serving
from featherweight.system.machine import INT8_DOT, cpu_features, describe, gpus
from featherweight.text.model_inputs import decoder_prefix
from featherweight.text.tokens import load_tokenizer, token_windows
from tasks.stage import stage

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

CT2_FOLDER = "ctranslate2"
CACHE_WINDOWS, CACHE_TOKENS = 32, 256
"""How much of the calibration text sets the scales of an fp8 cache."""
ROUNDED_FOR_VLLM = {"int8": "int8", "w8a16": "int8", "w4a16": "int4-g32", "fp8": "fp8"}


@stage("export", version="3", libraries=("ctranslate2", "transformers", "compressed-tensors", "torch", "torchao"), hardware=True)
def export(
    spec: ExportSpec, *, checkpoint: Path, calibration: Path, out: Path, seed: int = 0, progress: Progress = Progress()
) -> Metrics:
    """Write to `out` what `spec.engine` serves.

    compute_type: 'float32'; 'bfloat16' and 'float16' store and compute in 16 bits.
    For CTranslate2: 'int8' stores weights as int8 and rounds activations to int8 at run time;
    'int8_float32' stores the same weights and computes in float32, a quarter of the size at nearly no loss (CTranslate2's own
    type of that name is the same as its int8 on a CPU, so it is not offered); 'int8_float16' is its own, on CUDA.
    For vLLM: 'int8' is W8A8, 'w8a16' and 'w4a16' compute in float16, 'fp8' has e4m3 weights per row and activations per token;
    `kv_cache: fp8` keeps keys and values in e4m3, with scales from the calibration text.
    For PyTorch: bitsandbytes' 'nf4' and 'llm.int8', on CUDA; it rounds at load.
    Quantized weights of the checkpoint are packed as they are; float ones are rounded to nearest where compute_type, or the
    name of one of PyTorch's quantized engines (featherweight.runtimes.torch.pack), says so.
    Metrics: none for 'torch' where it is the reference itself or rounds by itself; else `parity_max_abs`, `parity_mean_abs`,
    `parity_bound` (nats, see runtimes.parity), and where CTranslate2 or PyTorch rounds activations also
    `parity_weights_max_abs`, the same with activations in float.
    Raises RecipeError for weights on a grid that the engine does not hold, ToolchainError where this machine has no kernel for
    them, StageError for an unknown architecture, ParityError where the engine does not compute what PyTorch computes.
    """
    quantized = QuantizedWeights.read(checkpoint)
    refuse(quantized, spec)
    if spec.kv_cache:
        _refuse_heads(load_config(checkpoint))
    if spec.engine == "torch" and spec.compute_type not in SIXTEEN_BITS:
        link_checkpoint(checkpoint, out)
        Serving("torch", options={"bitsandbytes": spec.compute_type} if spec.compute_type in BITSANDBYTES else {}).write(out)
        return {}
    model = load_reference(checkpoint)
    if spec.engine in torch_pack.FORMATS:
        return _export_torch(spec.engine, model, quantized, checkpoint, calibration, out, seed, progress)
    if spec.compute_type in SIXTEEN_BITS:
        _round_floats(model, spec.compute_type)
    elif quantized is None and spec.compute_type != "float32":
        quantized = round_to_nearest(model, *grids_here(spec))
        move_to_grid(model, quantized)
    progress.note(f"writing for {spec.engine}")
    if spec.engine == "ctranslate2":
        _write_ctranslate2(spec, model.float(), quantized, checkpoint, out)
    elif spec.engine == "vllm":
        _write_vllm(spec, model, quantized, checkpoint, out, calibration)
    else:
        opening.save_model(model, out, checkpoint)
        Serving("torch", options={"dtype": spec.compute_type}).write(out)
    reference = Reference.of(model.float(), checkpoint, calibration)
    del model, quantized
    progress.note(f"comparing {spec.engine} with PyTorch")
    weights = _check_weights(reference, out) if (spec.engine, spec.compute_type) == ("ctranslate2", "int8") else {}
    return {**weights, **reference.check(out)}


def _export_torch(
    engine: str,
    model: PreTrainedModel,
    quantized: QuantizedWeights | None,
    checkpoint: Path,
    calibration: Path,
    out: Path,
    seed: int,
    progress: Progress,
) -> Metrics:
    """One of PyTorch's quantized engines. The reference of a static one rounds activations by the same ranges."""
    kind = torch_pack.FORMATS[engine]
    quantized = quantized or round_to_nearest(model, GRIDS[kind.body], GRIDS[kind.head])
    move_to_grid(model, quantized)
    ranges = {}
    if kind.activations == "static":
        progress.note("finding the ranges of activations")
        ranges = input_ranges(model, quantized.q, checkpoint, calibration, seed)
    progress.note(f"writing for {engine}")
    torch_pack.write(model, quantized, ranges, out)
    copy_tokenizer(checkpoint, out)
    Serving(engine, grid=quantized.grid).write(out)
    reference = Reference.of(model, checkpoint, calibration)
    progress.note(f"comparing {engine} with PyTorch")
    if kind.activations == "float":
        return reference.check(out)
    weights = _check_float_twin(reference, out, calibration)
    with simulated(model, ranges):
        return {**weights, **Reference.of(model, checkpoint, calibration).check(out)}


def refuse(quantized: QuantizedWeights | None, spec: ExportSpec) -> None:
    """Raise RecipeError where the engine does not hold the grids of these weights, ToolchainError where this machine cannot.

    The plain PyTorch folder serves their float values: it is the baseline of a checkpoint that was loaded quantized.
    """
    quantized = None if spec.engine == "torch" else quantized
    body, head = (quantized.grid, quantized.head) if quantized else (None, None)
    reason = grid_refusal(GRIDS[body] if body else None, GRIDS[head] if head else None, spec)
    if reason:
        raise RecipeError(f"{body or 'float'} + {spec.engine}: {reason}")
    if reason := machine_refusal(spec, describe()):
        raise ToolchainError(reason)
    if quantized and spec.engine == "vllm":
        vllm_pack.check(quantized, vllm_pack.SCHEMES[spec.compute_type])


def _refuse_heads(config: PreTrainedConfig) -> None:
    """Raise RecipeError where vLLM's CPU kernel for an fp8 cache does not take heads of this width."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if width % 32 and not gpus():
        raise RecipeError(
            f"vLLM's fp8 cache wants heads of a multiple of 32 on a CPU, and these are {width} wide; leave kv_cache out"
        )


def grids_here(spec: ExportSpec) -> tuple[Grid, Grid | None]:
    """Grids of body and head for weights that are rounded here; vLLM keeps the head in float.

    For CTranslate2: 7 bits where its int8 would saturate at 8. Without VNNI its AVX2 kernel adds pairs of products in int16.
    """
    if spec.engine == "vllm":
        return GRIDS[ROUNDED_FOR_VLLM[spec.compute_type]], None
    saturates = not INT8_DOT & cpu_features() if spec.reduce_range == "auto" else spec.reduce_range
    grid = GRIDS["int8-reduced" if saturates and spec.compute_type == "int8" else "int8"]
    return grid, grid


def _round_floats(model: PreTrainedModel, name: str) -> None:
    """Move `model` in place to a float of 16 bits. Raises StageError for weights beyond float16's range."""
    import torch

    model.to(getattr(torch, name))
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise StageError(f"some weights are too large for {name}; take bfloat16")


def _write_ctranslate2(
    spec: ExportSpec, model: PreTrainedModel, quantized: QuantizedWeights | None, checkpoint: Path, out: Path
) -> None:
    model, quantized = without_padding(model, quantized)
    rows = QuantizedRows.of(model, quantized) if quantized else None
    sixteen = spec.compute_type in SIXTEEN_BITS
    ctranslate2_pack.convert(model, checkpoint, out / CT2_FOLDER, rows, spec.compute_type if sixteen else None)
    copy_tokenizer(checkpoint, out)
    on_cuda = {"compute_type": spec.compute_type, "device": "cuda"}
    on_cpu = {"compute_type": "int8" if spec.compute_type == "int8" else "float32"}
    grid = quantized.grid if quantized else None
    options = on_cuda if sixteen or spec.compute_type == "int8_float16" else on_cpu
    if model.config.is_encoder_decoder and len(prefix := decoder_prefix(model)) > 1:
        options["first_token"] = str(prefix[1])
    Serving("ctranslate2", CT2_FOLDER, options, grid).write(out)


def _write_vllm(
    spec: ExportSpec,
    model: PreTrainedModel,
    quantized: QuantizedWeights | None,
    checkpoint: Path,
    out: Path,
    calibration: Path,
) -> None:
    """`calibration`: text whose keys and values set the scales of an fp8 cache."""
    options: dict[str, str] = {"dtype": spec.compute_type} if spec.compute_type in SIXTEEN_BITS else {}
    if options and spec.kv_cache is None:
        opening.save_model(model, out, checkpoint)
    elif quantized is None and spec.kv_cache is None:
        link_checkpoint(checkpoint, out)
    else:
        copy_tokenizer(checkpoint, out)
        scheme = vllm_pack.SCHEMES.get(spec.compute_type)
        if quantized and scheme:
            vllm_pack.check(quantized, scheme)
        scales = vllm_pack.cache_scales(model, _windows(model, checkpoint, calibration)) if spec.kv_cache else None
        vllm_pack.pack(model, quantized, checkpoint, out, scheme, scales)
    if quantized:
        options["compute_type"] = spec.compute_type
        # The kernels for 4- and 8-bit weights in front of float activations know no float32, and on CUDA none of the others do.
        options["dtype"] = "float16" if spec.compute_type in ("w8a16", "w4a16") or gpus() else "float32"
    if spec.kv_cache:
        options["kv_cache_dtype"] = spec.kv_cache
    Serving("vllm", options=options, grid=quantized.grid if quantized else None).write(out)


def _windows(model: PreTrainedModel, checkpoint: Path, text: Path) -> list[list[int]]:
    """Token ids of a part of the calibration text."""
    length = min(CACHE_TOKENS, model.config.max_position_embeddings)
    return [window.ids for window in token_windows(text, load_tokenizer(checkpoint), length, CACHE_WINDOWS)]


def _check_float_twin(reference: Reference, served: Path, calibration: Path) -> Metrics:
    """Hold the packed weights to the exact bound, in layers that leave activations in float."""
    twin = Reference.of(torch_pack.load(served, torch_pack.WEIGHT_ONLY), served, calibration)
    measured = reference.hold(twin.logprobs, EXACT, f"{Serving.read(served).engine} with float activations")
    return {"parity_weights_max_abs": measured["parity_max_abs"]}


def _check_weights(reference: Reference, served: Path) -> Metrics:
    """Hold the packed weights to the exact bound, in a twin that has CTranslate2 compute in float32."""
    twin = served / "twin"
    (twin / CT2_FOLDER).mkdir(parents=True)
    for path in (served / CT2_FOLDER).iterdir():
        link(path, twin / CT2_FOLDER / path.name)
    copy_tokenizer(served, twin)
    Serving("ctranslate2", CT2_FOLDER, {"compute_type": "float32"}).write(twin)
    measured = reference.check(twin, EXACT)
    shutil.rmtree(twin)
    return {"parity_weights_max_abs": measured["parity_max_abs"]}
