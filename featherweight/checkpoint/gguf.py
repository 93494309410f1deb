"""GGUF files, converted through transformers. Integers that lie on a grid of ours stay as they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.files import Listing, adapter_files, has_weights
from featherweight.checkpoint.gguf_header import GgufHeader
from featherweight.checkpoint.gguf_parts import join, only_model, parts_of, whole_header
from featherweight.checkpoint.gguf_rotary import rotary_scaling, scale
from featherweight.checkpoint.gguf_settings import configuration, misplaced
from featherweight.checkpoint.gguf_tokenizer import gguf_tokenizer
from featherweight.checkpoint.inspection import check_loading, quiet
from featherweight.checkpoint.patches import read_once
from featherweight.checkpoint.saving import save_tokenizer
from featherweight.checkpoint.tensors import saving
from featherweight.checkpoint.tokenizer import require_same_tokenizer
from featherweight.errors import CheckpointError, one_line
from featherweight.grid import GRIDS, Grid
from featherweight.model.matrices import heads, matrices, rows_of
from featherweight.model.quantized_weights import QuantizedWeights
from featherweight.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

GRID_OF = {"Q8_0": "int8-g32", "Q4_0": "int4-g32"}
"""GGUF's types whose weights are an integer times the scale of its group of 32, and the grid that this is."""
FLOATS = ("F32", "F16", "BF16", "F64")


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that `path` is, or that lies in it instead of safetensors or a pickle; of a split model, the first part."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path} is a file; expected a checkpoint folder, or a .gguf file")
        return parts_of(path)[0]
    if not path.is_dir() or has_weights(listing := Listing.of(path)) or adapter_files(listing):
        return None
    names = sorted(file.name for file in path.glob("*.gguf"))
    model = only_model(names)
    if names and model is None:
        raise CheckpointError(f"{path} holds {len(names)} GGUF files; name one, such as {path / names[0]}")
    return parts_of(path / model[0])[0] if model else None


def convert_gguf(file: Path, work: Path, out: Path, progress: Progress) -> dict[str, float]:
    """Write a GGUF file's weights, as float32 safetensors, and its tokenizer into `out`, through transformers.

    work: where the parts of a split model are joined. Weights of Q8_0 and Q4_0 keep their integers and scales, as a quantize
    stage leaves them. Returns `quantized_layers`, those, and `dequantized_layers`, those of other types; nothing for a float file.
    """
    parts = parts_of(file)
    header = whole_header(parts)
    scaling = rotary_scaling(parts, header)
    with _reading(file):
        whole = file if len(parts) == 1 else join(parts, work / "whole.gguf")
        tokenizer = gguf_tokenizer(whole)
    save_tokenizer(tokenizer, out, called=str(file))  # before the weights, which take minutes
    progress.note(f"dequantizing {file.name}")
    with _reading(file), read_once():
        model, info = _read(whole, header)
        quantized, types = _integers(whole, model)
    if scaling:
        scale(model.config.rope_parameters, scaling)
        progress.note(f"rotary embeddings are scaled ({scaling['rope_type']}, {scaling['factor']:g} times), as the file says")
    check_loading(file, model, info)
    with saving(out), quiet():
        model.save_pretrained(out, max_shard_size="5GB")
        if quantized.q:
            quantized.write(out)
    require_same_tokenizer(tokenizer, out, called=str(file))  # config.json has a say in the class that reads it
    return _told(quantized, types, progress)


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """The reader trusts the file: a damaged one fails anywhere."""
    try:
        with quiet():
            yield
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    except Exception as error:
        raise CheckpointError(f"{file} cannot be read as a GGUF checkpoint: {one_line(error)}") from error


def _read(file: Path, header: GgufHeader) -> Any:
    """The model, and what loading it tells."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import GgufConfig

    config = configuration(file.parent, file.name, header)
    if reason := misplaced(config, header):
        raise CheckpointError(reason)
    loading: Any = AutoModelForCausalLM.from_pretrained
    return loading(
        file.parent,
        config=config,
        gguf_file=file.name,
        # Without this the weights may stay packed, and the model cannot be saved.
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        local_files_only=True,
        output_loading_info=True,
    )


def _integers(file: Path, model: PreTrainedModel) -> tuple[QuantizedWeights, Counter[str]]:
    """The weights of `model` that are integers on a grid of ours in the file, and how many matrices there are of each type.

    Rows are found by their float values: names differ, and those of queries and keys are in another order in the file.
    """
    import gguf

    kept = QuantizedWeights({}, {}, {}, "gguf", heads(model))
    matrix = [tensor for tensor in gguf.GGUFReader(file).tensors if len(tensor.shape) == 2]
    types = Counter(tensor.tensor_type.name for tensor in matrix)
    for kind, name in GRID_OF.items() if keeps_integers(types_of(matrix)) else ():
        grid = GRIDS[name]
        places: dict[bytes, tuple[Tensor, Tensor]] = {}
        for tensor in matrix:
            if tensor.tensor_type.name == kind:
                q, scales = _unpacked(tensor, kind)
                places |= {row.numpy().tobytes(): (q[at], scales[at]) for at, row in enumerate(grid.dequantize(q, scales))}
        _keep(kept, grid, model, places)
    return kept, types


def types_of(tensors: Iterable[Any]) -> dict[str, str]:
    """The type of each matrix among a file's tensors, by its name there."""
    return {str(tensor.name): str(tensor.tensor_type.name) for tensor in tensors if len(tensor.shape) == 2}


def keeps_integers(types: Mapping[str, str]) -> bool:
    """Whether the integers of Q8_0 and Q4_0 stay: where most matrices in the blocks are of these types.

    A checkpoint whose embedding alone lies on a grid is one to be quantized, not one that is quantized already.
    """
    blocks = [kind for name, kind in types.items() if "blk." in name and kind not in FLOATS]
    return 2 * sum(kind in GRID_OF for kind in blocks) > len(blocks)


def _keep(kept: QuantizedWeights, grid: Grid, model: PreTrainedModel, places: Mapping[bytes, tuple[Tensor, Tensor]]) -> None:
    import torch

    for name, parameter, transposed in matrices(model) if places else ():
        rows = [places.get(row.contiguous().numpy().tobytes()) for row in rows_of(parameter, transposed)]
        found = [row for row in rows if row is not None]
        if len(found) == len(rows):
            kept.grids[name] = grid
            kept.q[name], kept.scales[name] = (torch.stack([row[part] for row in found]) for part in (0, 1))


def _unpacked(tensor: Any, kind: str) -> tuple[Tensor, Tensor]:
    """int8 [rows, columns] and float32 scales [rows, groups] of a Q8_0 or Q4_0 tensor (ggml's block_q8_0, block_q4_0).

    A block is a float16 scale and 32 integers: signed bytes, or halves of 16 bytes, offset by 8, the low ones first.
    """
    import numpy
    import torch

    columns, rows = (int(size) for size in tensor.shape)
    blocks = tensor.data.reshape(rows * columns // 32, -1)
    scales = blocks[:, :2].copy().view(numpy.float16).astype(numpy.float32).reshape(rows, columns // 32)
    if kind == "Q8_0":
        q = blocks[:, 2:].copy().view(numpy.int8)
    else:
        q = numpy.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1).astype(numpy.int8) - 8
    return torch.from_numpy(q.reshape(rows, columns)), torch.from_numpy(scales)


def _told(quantized: QuantizedWeights, types: Counter[str], progress: Progress) -> dict[str, float]:
    lost = {kind: count for kind, count in types.items() if kind not in FLOATS and (kind not in GRID_OF or not quantized.q)}
    if lost:
        kinds = ", ".join(f"{kind} ({count})" for kind, count in sorted(lost.items()))
        progress.note(f"matrices become float: {kinds}")
    if not lost and not quantized.q:
        return {}
    return {"quantized_layers": float(len(quantized.q)), "dequantized_layers": float(sum(lost.values()))}
