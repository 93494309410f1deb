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
from featherweight.checkpoint.tokenizer import load_tokenizer
from featherweight.grid import GRIDS, Grid
from featherweight.model.architecture import LAYOUTS, task_of
from featherweight.model.padding import without_padding
from featherweight.model.positions import context_tokens
from featherweight.progress import Metrics
from featherweight.runtimes.bounds import EXACT, Bound
from featherweight.runtimes.ctranslate2.encoder import write_head
from featherweight.runtimes.ctranslate2.loaded import SOURCES, TARGETS, vocabulary
from featherweight.runtimes.ctranslate2.pack import convert
from featherweight.runtimes.ctranslate2.shortlist import write_shortlist
from featherweight.runtimes.packing import QuantizedRows
from featherweight.runtimes.parity import Reference
from featherweight.runtimes.spec import SIXTEEN_BITS
from featherweight.spec import HEADED
from featherweight.store.mapped import give_back_heap
from featherweight.store.served_folder import Serving
from featherweight.system.device import CPU, Device
from featherweight.system.machine import INT8_DOT, cpu_features
from featherweight.text.model_inputs import decoder_prefix, token_pairs

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
    if spec.shortlist:
        _write_shortlist(spec.shortlist, source, out / FOLDER)
    copy_tokenizer(source.checkpoint, out)
    Serving("ctranslate2", FOLDER, _options(spec, model), source.grid).write(out)


def _write_shortlist(most: int, source: Source, folder: Path) -> None:
    """From the calibration text's targets. Special tokens, such as those of languages, are in every list."""
    sources, targets = vocabulary(folder, SOURCES), vocabulary(folder, TARGETS)
    tokenizer = load_tokenizer(source.checkpoint)
    pairs = token_pairs(source.calibration, tokenizer, context_tokens(source.config), source.seed)
    special = [one for one in sorted(tokenizer.all_special_ids) if one < len(targets)]
    write_shortlist(folder, pairs, sources, targets, most, special)


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
    return options | ({"shortlist": str(spec.shortlist)} if spec.shortlist else {})


def check_whole(reference: Reference, served: Path) -> Metrics:
    """The same as `Reference.check` where texts are written in a shortlist: held to PyTorch with the whole vocabulary."""
    serving = Serving.read(served)
    options = {name: value for name, value in serving.options.items() if name != "shortlist"}
    whole = replace(serving, options=options)
    return _check_twin(reference, served, whole, lambda out: _link_all(served / FOLDER, out))


def check_weights(source: Source, reference: Reference, served: Path) -> Metrics:
    """Hold the packed weights to the exact bound, in a twin that has CTranslate2 compute in float32.

    Of a model whose weights stay in its files, which would be four times as large there, a few layers at a time between its
    embedding and its head, so that every layer is looked at.
    """
    in_float = Serving("ctranslate2", FOLDER, {"compute_type": "float32"}).on(Serving.read(served).device)
    if not source.streams or source.config.model_type not in LAYOUTS:
        found = _check_twin(reference, served, in_float, lambda out: _link_all(served / FOLDER, out), EXACT)
        return {"parity_weights_max_abs": found["parity_max_abs"]}
    rows = QuantizedRows.of(source.model, source.quantized) if source.quantized else None
    largest = []
    for layers in source.parts():
        part = Reference.of(source.computing(layers), source.checkpoint, source.calibration, source.max_tokens)
        found = _check_twin(part, served, in_float, partial(_convert_part, source, rows, layers), EXACT)
        largest.append(found["parity_max_abs"])
    return {"parity_weights_max_abs": max(largest)}


def _check_twin(
    reference: Reference, served: Path, serving: Serving, write_weights: Callable[[Path], None], bound: Bound | None = None
) -> Metrics:
    """Compare with what is served otherwise, by other weights or other options."""
    twin = served / "twin"
    twin.mkdir()
    write_weights(twin / FOLDER)
    copy_tokenizer(served, twin)
    serving.write(twin)
    give_back_heap()  # what the conversion has left free
    measured = reference.check(twin, bound)
    shutil.rmtree(twin)
    return measured


def _link_all(folder: Path, out: Path) -> None:
    out.mkdir()
    for path in folder.iterdir():
        link(path, out / path.name)


def _convert_part(source: Source, rows: QuantizedRows | None, layers: tuple[int, ...], out: Path) -> None:
    """Convert some layers of a model whose weights stay in its files."""
    model = mapped_model(source.checkpoint, layers)
    assert model is not None
    convert(model, source.checkpoint, out, rows and replace(rows, unused=set()))
