"""Writing the folder that llama.cpp serves: one GGUF file, and the tokenizer's files beside it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.files import link
from featherweight.checkpoint.saving import copy_tokenizer
from featherweight.errors import RecipeError
from featherweight.grid import GRIDS
from featherweight.model.architecture import task_of
from featherweight.model.matrices import matrices, rows_of
from featherweight.progress import Metrics
from featherweight.quantization.imatrix import importances
from featherweight.runtimes.bounds import EXACT, TABLE
from featherweight.runtimes.llama_cpp import blocks, library
from featherweight.runtimes.llama_cpp.adapter_files import write_adapters
from featherweight.runtimes.llama_cpp.answers import write_head
from featherweight.runtimes.llama_cpp.architectures import ARCHITECTURES
from featherweight.runtimes.llama_cpp.keys import describe
from featherweight.runtimes.llama_cpp.own_kinds import OWN, Stored, round_by_llama_cpp
from featherweight.runtimes.llama_cpp.tensors import Tensors
from featherweight.runtimes.llama_cpp.vocabulary import PREPARED, Vocabulary, agrees
from featherweight.runtimes.speculation import DRAFT
from featherweight.spec import HEADED
from featherweight.store.mapped import give_back
from featherweight.store.served_folder import FILE, Serving
from featherweight.text.documents import read_documents
from featherweight.text.model_inputs import example_blocks
from featherweight.text.respelling import Respelling

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from numpy import ndarray
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from featherweight.model.quantized_weights import QuantizedWeights
    from featherweight.runtimes.llama_cpp.runtime import LlamaCppSpec
    from featherweight.runtimes.parity import Reference
    from featherweight.runtimes.writing import Source

MODEL = "model.gguf"
ROUNDED_HERE = {"int8": ("int8-g32", "int8-g32"), "int4": ("int4-g32", "int8-g32")}
"""Grids of the blocks and of embedding and head, by precision, where no quantize stage chose them."""
FILE_TYPE = {"float32": 0, "float16": 1, "int4": 2, "int8": 7, "q4_k": 15, "q5_k": 17, "q6_k": 18, "iq4_nl": 25}
"""llama_ftype: what most matrices of a file are."""
SAMPLES, SEQUENCE = 64, 128
"""Blocks of calibration text, and their tokens, that tell which columns carry much: as many as a quantize stage reads."""
TEXTS = 8
"""Documents of the calibration text that the file's tokenizer is tried with."""
ONE_ROW = "shared_expert_gate.weight"
"""What transformers keeps as a matrix of one row, and llama.cpp's files, and who reads them, as a vector."""
SAME, OTHER = "same", "other"
"""Whether the file's own tokenizer cuts texts into the checkpoint's ids."""


def write(spec: LlamaCppSpec, source: Source, out: Path) -> None:
    """See Runtime.write."""
    stored: Stored = {}
    if spec.precision == "float16":
        source.round_floats("float16")
    elif spec.precision in OWN:
        stored = round_by_llama_cpp(source, spec.precision, _importance(source) if spec.imatrix else {})
    elif spec.precision != "float32":
        stored = packed(source.model, source.round(*(GRIDS[name] for name in ROUNDED_HERE[spec.precision])))
    model = source.model if source.streams else source.model.float()
    texts = [one.text for one in islice(read_documents(source.calibration), TEXTS)]
    vocabulary = Vocabulary(source.checkpoint, model.config.vocab_size)
    prepared = _prepared(vocabulary, model.config, out / "vocabulary.gguf", texts)
    if prepared is None:
        source.progress.note("llama.cpp's own tokenizer cuts some texts otherwise; it is given token ids")
    write_file(out / MODEL, model, stored, vocabulary, spec.precision, prepared or PREPARED[0])
    copy_tokenizer(source.checkpoint, out)
    write_head(model, out)
    write_adapters(model, out)
    if source.draft:
        keep_draft(source.draft, out)
    kept = "float32" if spec.precision == "float32" else "float16"
    options = {"dtype": kept, "tokenizer": SAME if prepared else OTHER, "built_with": library.built_with()}
    options |= {"rounded": OWN[spec.precision]} if spec.precision in OWN else {}
    options |= {"gelu": "table"} if ARCHITECTURES[model.config.model_type].approximates else {}
    options |= {"kv_cache": spec.kv_cache} if spec.kv_cache else {}
    options |= {"task": task} if (task := task_of(model.config)) in HEADED else {}
    Serving("llama.cpp", options=options, grid=source.grid).write(out)


def _importance(source: Source) -> Mapping[str, Tensor]:
    """Of the columns of each matrix, on the calibration text."""
    blocks = example_blocks(source.checkpoint, source.config, source.calibration, SEQUENCE, limit=SAMPLES, seed=source.seed)
    return importances(source.computing(), blocks)


def keep_draft(draft: Path, served: Path) -> None:
    """Put the file of `draft`, a served folder, beside that of `served`. Raises RecipeError where their tokens are not the same."""
    if Respelling.between(draft, served):
        raise RecipeError("speculation.draft has other tokens than what it is to draft for; name one with the same tokenizer")
    (served / DRAFT).mkdir()
    link(draft / MODEL, served / DRAFT / MODEL)
    Serving.read(draft).write(served / DRAFT)


def write_file(
    file: Path,
    model: PreTrainedModel,
    stored: Stored,
    vocabulary: Vocabulary,
    precision: str,
    prepared: str = PREPARED[0],
) -> None:
    """The GGUF file of `model`: matrices that are rounded as they are `stored`, others in the float that `precision` says.

    prepared: llama.cpp's name of the way in which the tokenizer cuts a text before it merges pieces.
    """
    with _writer(file, model.config, precision) as writer:
        vocabulary.write(writer, prepared)
        _write_tensors(writer, _tensors(model, stored, "float16" if precision == "float16" else "float32"))


def _prepared(vocabulary: Vocabulary, config: Any, trial: Path, texts: list[str]) -> str | None:
    """The first way to cut texts that agrees with the checkpoint's, tried in files without weights; None where none does."""
    for name in vocabulary.ways:
        with _writer(trial, config, "float32") as writer:
            vocabulary.write(writer, name)
            _write_tensors(writer, ())
        same = agrees(trial, vocabulary.checkpoint, texts)
        trial.unlink()
        if same:
            return name
    return None


@contextmanager
def _writer(file: Path, config: Any, precision: str) -> Iterator[GGUFWriter]:
    """A file that is described already."""
    from gguf import GGML_QUANT_VERSION, GGUFWriter

    writer = GGUFWriter(file, ARCHITECTURES[config.model_type].name)
    describe(writer, config)
    writer.add_file_type(FILE_TYPE[precision])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    yield writer
    writer.close()


@dataclass(frozen=True)
class Entry:
    """A tensor of a GGUF file, which is made when it is written. shape: of its values. kind: ggml's type."""

    name: str
    shape: tuple[int, ...]
    kind: Any
    make: Callable[[], ndarray]


def _write_tensors(writer: GGUFWriter, entries: Iterable[Entry]) -> None:
    """Write the file: what it says of all tensors first, then one tensor after the other."""
    import numpy
    from gguf import GGML_QUANT_SIZES

    entries = list(entries)
    for entry in entries:
        block, size = GGML_QUANT_SIZES[entry.kind]
        writer.add_tensor_info(entry.name, entry.shape, numpy.dtype("f4"), math.prod(entry.shape) // block * size, entry.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        writer.write_tensor_data(entry.make())


def packed(model: PreTrainedModel, quantized: QuantizedWeights) -> Stored:
    """Blocks of the grids' own integers and scales, made when they are asked for."""
    return {
        name: (blocks.kind(name, quantized.grids[name], quantized.q[name]), partial(blocks.pack_parameter, name, quantized))
        for name, _, _ in matrices(model)
        if name in quantized.q
    }


def _tensors(model: PreTrainedModel, stored: Stored, floats: str) -> Iterator[Entry]:
    """Every tensor, rows in llama.cpp's order; a tied head is the embedding's."""
    from gguf import GGMLQuantizationType

    tensors, kind_of_floats = Tensors(model), GGMLQuantizationType[{"float16": "F16", "float32": "F32"}[floats]]
    for name, values in tensors.vectors():
        yield Entry(name, values.shape, GGMLQuantizationType.F32, values.copy)
    for parameter, weight, transposed in matrices(model):
        kind, make = stored.get(parameter) or (kind_of_floats, partial(_floats, weight, transposed, floats))
        made = partial(_in_order, make, tensors.order(parameter))
        entry = Entry(tensors.name(parameter), tuple(rows_of(weight, transposed).shape), kind, made)
        yield _one_row(entry) if parameter.endswith(ONE_ROW) else entry
    for name, parameter, weight, rows in tensors.experts():
        kind, make = stored.get(parameter) or (kind_of_floats, partial(_floats, weight, False, floats))
        yield Entry(name, tuple(weight[:, rows].shape), kind, partial(_part, make, rows))


def _one_row(entry: Entry) -> Entry:
    """A matrix of one row as a vector."""
    return Entry(entry.name, entry.shape[1:], entry.kind, lambda: entry.make()[0])


def _floats(weight: nn.Parameter, transposed: bool, kind: str) -> ndarray:
    made: ndarray = rows_of(weight, transposed).cpu().float().numpy().astype(kind)
    give_back(weight)
    return made


def _part(make: Callable[[], ndarray], rows: slice) -> ndarray:
    """Some rows of every expert's matrix."""
    return make()[:, rows]


def _in_order(make: Callable[[], ndarray], order: ndarray | None) -> ndarray:
    values = make()
    return values if order is None else values[order]


def check_weights(reference: Reference, served: Path) -> Metrics:
    """Hold the packed weights to the exact bound, in a twin of the file that holds in float32 what the `gguf` library unpacks."""
    twin = served / "twin"
    twin.mkdir()
    _unpack(served / MODEL, twin / MODEL)
    for path in served.iterdir():
        if path.is_file() and path.name not in (MODEL, FILE):
            link(path, twin / path.name)
    kept = {name: told for name, told in Serving.read(served).options.items() if name == "task"}
    Serving("llama.cpp", options={"dtype": "float32"} | kept).write(twin)
    measured = reference.check(twin, TABLE if "gelu" in Serving.read(served).options else EXACT)
    shutil.rmtree(twin)
    return {"parity_weights_max_abs": measured["parity_max_abs"]}


def _unpack(file: Path, out: Path) -> None:
    """The same file with every tensor in float32, and without a tokenizer."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
    from gguf.quants import dequantize

    reader = GGUFReader(file)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith(("GGUF.", "tokenizer."))}
    writer = GGUFWriter(out, fields.pop("general.architecture").contents())
    for name, field in fields.items():
        writer.add_key_value(name, field.contents(), field.types[0])
    writer.add_tokenizer_model("none")
    shapes = [tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors]
    entries = [
        Entry(one.name, shape, GGMLQuantizationType.F32, partial(dequantize, one.data, one.tensor_type))
        for one, shape in zip(reader.tensors, shapes, strict=True)
    ]
    _write_tensors(writer, entries)
    writer.close()
