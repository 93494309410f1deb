"""Checkpoints that are not plain float safetensors, converted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.checkpoint.files import INDEX, PICKLE_INDEX, WEIGHTS, Listing, Weights, copy, find_weights, link, needed_files
from featherweight.checkpoint.gguf import convert_gguf, gguf_file
from featherweight.checkpoint.inspection import CheckpointInfo, dry_load, inspect_checkpoint
from featherweight.checkpoint.quantized_formats import method_of
from featherweight.checkpoint.spec import LoadSpec
from featherweight.checkpoint.tensors import load_pickle, saving, stream_tensors
from featherweight.checkpoint.tokenizer import require_same_tokenizer
from featherweight.checkpoint.unpacking import read_config, unpack
from featherweight.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor


def adopt(found: Path, spec: LoadSpec, out: Path, progress: Progress, unpacked: dict[str, float]) -> CheckpointInfo:
    """Check a local folder or GGUF file and put it into `out`, converted where it is not plain float safetensors.

    Of weights that are quantized already, `unpacked` gets what became of them.
    """
    progress.note(f"checking {spec.source}")
    gguf = gguf_file(found)
    if gguf is not None:
        convert_gguf(gguf, out, progress)
        return inspect_checkpoint(out, task=spec.task)
    info = _adopt_folder(found, spec, out, progress, unpacked)
    require_same_tokenizer(found, out, trust_remote_code=spec.trust_remote_code)
    return info


def _adopt_folder(found: Path, spec: LoadSpec, out: Path, progress: Progress, unpacked: dict[str, float]) -> CheckpointInfo:
    weights = find_weights(Listing.of(found), allow_pickle=spec.allow_pickle)
    if weights.pickled:
        _convert_pickle(found, weights, spec, out, progress)
        return inspect_checkpoint(out, task=spec.task, trust_remote_code=spec.trust_remote_code)
    config = read_config(found)
    if method_of(config) is not None:
        with saving(out):
            unpacked |= unpack(found, config, weights, out, progress)
        return inspect_checkpoint(out, task=spec.task)
    info = inspect_checkpoint(found, task=spec.task, trust_remote_code=spec.trust_remote_code)
    for name in needed_files(Listing.of(found), weights, trust_remote_code=spec.trust_remote_code):
        _take((found / name).resolve(), out, name)
    return info


def _take(source: Path, out: Path, name: str) -> None:
    """What was downloaded below `out` is ours; what anyone else holds must not reach our copy when it is written."""
    (link if out.resolve() in source.parents and source.suffix == ".safetensors" else copy)(source, out / name)


def _convert_pickle(folder: Path, weights: Weights, spec: LoadSpec, out: Path, progress: Progress) -> None:
    """Write a pickled checkpoint's tensors as safetensors, shard by shard, and copy the rest."""
    from safetensors.torch import save_file

    shapes = {name: tuple(tensor.shape) for _, name, tensor in stream_tensors(folder, weights)}
    ties = dry_load(folder, shapes, spec.task, trust_remote_code=spec.trust_remote_code).all_tied_weights_keys
    mapping: dict[str, str] = {}
    size = 0
    for number, file in enumerate(weights.files, 1):
        progress.note(f"converting {file} ({number} of {len(weights.files)})")
        shard = f"model-{number:05}-of-{len(weights.files):05}.safetensors" if weights.index else WEIGHTS
        tensors = _unshared(load_pickle(folder / file), ties)
        with saving(out):
            save_file(tensors, out / shard, metadata={"format": "pt"})
        mapping |= dict.fromkeys(tensors, shard)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if weights.index:
        (out / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": mapping}, indent=1))
    listing = Listing.of(folder)
    for name in needed_files(listing, weights, trust_remote_code=spec.trust_remote_code):
        if name not in (*weights.files, PICKLE_INDEX):
            copy(folder / name, out / name)


def _unshared(tensors: Mapping[str, Tensor], ties: Mapping[str, str]) -> dict[str, Tensor]:
    """Contiguous tensors without common storage: the tied copies left out, others that share copied."""
    kept: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        twin = tensors.get(ties.get(name, ""))
        if twin is not None and twin.data_ptr() == tensor.data_ptr() and twin.shape == tensor.shape:
            continue
        storage = tensor.untyped_storage().data_ptr()
        kept[name] = tensor.clone().contiguous() if storage in storages else tensor.contiguous()
        storages.add(storage)
    return kept
