"""Writing the folder that CTranslate2 serves: its own files in a sub-folder, the tokenizer beside it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.checkpoint.files import link
from featherweight.checkpoint.saving import copy_tokenizer
from featherweight.checkpoint.streamed import mapped_model
from featherweight.grid import GRIDS, Grid
from featherweight.model.architecture import LAYOUTS, task_of
from featherweight.model.padding import without_padding
from featherweight.progress import Metrics
from featherweight.runtimes.bounds import EXACT
from featherweight.runtimes.ctranslate2.encoder import write_head
from featherweight.runtimes.ctranslate2.pack import convert
from featherweight.runtimes.packing import QuantizedRows
from featherweight.runtimes.parity import Reference
from featherweight.runtimes.spec import SIXTEEN_BITS
from featherweight.spec import HEADED
from featherweight.store.mapped import give_back_heap
from featherweight.store.served_folder import Serving
from featherweight.system.device import CPU, Device
from featherweight.system.machine import INT8_DOT, cpu_features
from featherweight.text.model_inputs import decoder_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from featherweight.runtimes.ctranslate2.runtime import CTranslate2Spec
    from featherweight.runtimes.writing import Source

FOLDER = "ctranslate2"


def write(spec: CTranslate2Spec, source: Source, out: Path) -> None:
    """See Runtime.write."""
    if spec.compute_type in SIXTEEN_BITS:
        source.round_floats(spec.compute_type)
    elif spec.compute_type != "float32":
        source.round(grid_here(spec, source.device), grid_here(spec, source.device))
    model, quantized = without_padding(source.model if source.streams else source.model.float(), source.quantized)
    rows = QuantizedRows.of(model, quantized) if quantized else None
    floats = spec.compute_type if spec.compute_type in SIXTEEN_BITS else None
    convert(model, source.checkpoint, out / FOLDER, rows, floats)
    if task_of(model.config) in HEADED:
        write_head(source.model, out / FOLDER)
    copy_tokenizer(source.checkpoint, out)
    Serving("ctranslate2", FOLDER, _options(spec, model), source.grid).write(out)


def grid_here(spec: CTranslate2Spec, device: Device = CPU) -> Grid:
    """The grid of weights that are rounded here: 7 bits where its int8 would saturate at 8.

    Without VNNI its AVX2 kernel adds pairs of products in int16.
    """
    saturates = device == CPU and not INT8_DOT & cpu_features() if spec.reduce_range == "auto" else spec.reduce_range
    return GRIDS["int8-reduced" if saturates and spec.compute_type == "int8" else "int8"]


def _options(spec: CTranslate2Spec, model: PreTrainedModel) -> dict[str, str]:
    """What CTranslate2Model is told at load."""
    # Its own int8_float32 rounds activations as its int8 does.
    options = {"compute_type": "float32" if spec.compute_type == "int8_float32" else str(spec.compute_type)}
    if model.config.is_encoder_decoder and len(prefix := decoder_prefix(model)) > 1:
        options["first_token"] = str(prefix[1])
    if spec.workers > 1:
        options["workers"] = str(spec.workers)
    return options


def check_weights(source: Source, reference: Reference, served: Path) -> Metrics:
    """Hold the packed weights to the exact bound, in a twin that has CTranslate2 compute in float32.

    Of a model whose weights stay in its files, which would be four times as large there, a few layers at a time between its
    embedding and its head, so that every layer is looked at.
    """
    if not source.streams or source.config.model_type not in LAYOUTS:
        return {"parity_weights_max_abs": _check_twin(reference, served, lambda out: _link_all(served / FOLDER, out))}
    rows = QuantizedRows.of(source.model, source.quantized) if source.quantized else None
    found = []
    for layers in source.parts():
        part = Reference.of(source.computing(layers), source.checkpoint, source.calibration, source.max_tokens)
        found.append(_check_twin(part, served, partial(_convert_part, source, rows, layers)))
    return {"parity_weights_max_abs": max(found)}


def _check_twin(reference: Reference, served: Path, write_weights: Callable[[Path], None]) -> float:
    twin = served / "twin"
    twin.mkdir()
    write_weights(twin / FOLDER)
    copy_tokenizer(served, twin)
    Serving("ctranslate2", FOLDER, {"compute_type": "float32"}).on(Serving.read(served).device).write(twin)
    give_back_heap()  # what the conversion has left free
    measured = reference.check(twin, EXACT)
    shutil.rmtree(twin)
    return measured["parity_max_abs"]


def _link_all(folder: Path, out: Path) -> None:
    out.mkdir()
    for path in folder.iterdir():
        link(path, out / path.name)


def _convert_part(source: Source, rows: QuantizedRows | None, layers: tuple[int, ...], out: Path) -> None:
    """Convert some layers of a model whose weights stay in its files."""
    model = mapped_model(source.checkpoint, layers)
    assert model is not None
    convert(model, source.checkpoint, out, rows and replace(rows, unused=set()))
