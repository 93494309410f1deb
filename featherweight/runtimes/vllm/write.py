"""Writing the folder that vLLM serves: a checkpoint as it is, in 16 bits, or in one of compressed-tensors' formats."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.checkpoint.saving import copy_tokenizer, link_checkpoint
from featherweight.checkpoint.tokenizer import load_tokenizer
from featherweight.errors import RecipeError
from featherweight.grid import GRIDS
from featherweight.runtimes.candidate import rows_of
from featherweight.runtimes.spec import SIXTEEN_BITS
from featherweight.runtimes.vllm import on_cpus, pack
from featherweight.runtimes.vllm.schemes import SCHEMES
from featherweight.store.served_folder import Serving
from featherweight.system.device import CUDA
from featherweight.text.tokens import token_windows

if TYPE_CHECKING:
    from featherweight.runtimes.vllm.runtime import VllmSpec
    from featherweight.runtimes.writing import Source

CACHE_WINDOWS, CACHE_TOKENS = 32, 256
"""How much of the calibration text sets the scales of an fp8 cache."""
OTHER_GELU = ("bloom",)
"""Model types whose GELU it computes by the error function where transformers takes the hyperbolic tangent."""
ROUNDED_HERE = {"int8": "int8", "w8a16": "int8", "w4a16": "int4-g32", "fp8": "fp8"}
"""Grids by compute type, where no quantize stage chose them; the head stays in float."""


def write(spec: VllmSpec, source: Source, out: Path) -> None:
    """See Runtime.write."""
    if spec.compute_type in SIXTEEN_BITS:
        if not spec.kv_cache:
            source.save_rounded(spec.compute_type, out)
        else:
            source.round_floats(spec.compute_type)
    elif spec.compute_type != "float32":
        source.round(GRIDS[ROUNDED_HERE[spec.compute_type]], None)
    if source.quantized or spec.kv_cache:
        _write_packed(spec, source, out)
    elif spec.compute_type not in SIXTEEN_BITS:
        link_checkpoint(source.checkpoint, out)
    Serving("vllm", options=_options(spec, source), grid=source.grid).write(out)


def _write_packed(spec: VllmSpec, source: Source, out: Path) -> None:
    copy_tokenizer(source.checkpoint, out)
    scheme = SCHEMES.get(spec.compute_type)
    if source.quantized and scheme and (reason := pack.fused_refusal(rows_of(source.quantized), scheme)):
        raise RecipeError(reason)
    computing = source.computing() if source.streams else source.model
    scales = pack.cache_scales(computing, cache_windows(source)) if spec.kv_cache else None
    floats = spec.compute_type if spec.compute_type in SIXTEEN_BITS else "float32"
    pack.pack(source.model, source.quantized, source.checkpoint, out, scheme, scales, floats, source.change)


def _options(spec: VllmSpec, source: Source) -> dict[str, str]:
    """What VllmModel is told at load."""
    options: dict[str, str] = {"dtype": spec.compute_type} if spec.compute_type in SIXTEEN_BITS else {}
    if source.quantized:
        options["compute_type"] = spec.compute_type
        # The kernels for 4- and 8-bit weights in front of float activations know no float32, and on CUDA none of the others do.
        halved = spec.compute_type in ("w8a16", "w4a16") or source.device == CUDA
        options["dtype"] = "float16" if halved else "bfloat16" if on_cpus.wants_bfloat16(spec.compute_type) else "float32"
    if source.config.model_type in OTHER_GELU:
        options["gelu"] = "erf"
    if spec.kv_cache:
        options["kv_cache_dtype"] = spec.kv_cache
    if spec.tensor_parallel_size > 1:
        options["tensor_parallel_size"] = str(spec.tensor_parallel_size)
    return options


def cache_windows(source: Source) -> list[list[int]]:
    """Token ids of a part of the calibration text."""
    length = min(CACHE_TOKENS, source.config.get_text_config().max_position_embeddings)
    return [window.ids for window in token_windows(source.calibration, load_tokenizer(source.checkpoint), length, CACHE_WINDOWS)]
