"""Saving and copying checkpoint folders: whatever is written carries all of the one list, and a tokenizer that is proven."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.checkpoint.files import CONFIG, INDEX, Listing, companions, copy, find_weights, link, needed_files
from featherweight.checkpoint.opening import GENERATION, generation_config
from featherweight.checkpoint.overwritten import write_as_loaded
from featherweight.checkpoint.tensors import stream_tensors
from featherweight.checkpoint.tokenizer import require_same_tokenizer
from featherweight.store.tensor_file import Kind, write_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_model(model: PreTrainedModel, out: Path, source: Path | None = None) -> None:
    """Write `model` to `out` as safetensors, with the companions of the folder `source`, and the generation settings that it has.

    What transformers writes into weights when it loads them is written into those of `model` first (see overwritten.py).
    Raises CheckpointError where their tokenizer is not that of `source` any more.
    """
    write_as_loaded(model)
    with _without_settings(model):
        model.save_pretrained(out, max_shard_size="5GB")
    if source is not None:
        # Those that transformers reads of a config.json its own saving leaves out.
        settings = None if (source / GENERATION).is_file() or not model.can_generate() else generation_config(source)
        copy_companions(source, out)
        if settings is not None:
            (out / GENERATION).write_text(settings.to_json_string())


@contextmanager
def _without_settings(model: PreTrainedModel) -> Iterator[None]:
    """transformers refuses to save generation settings that contradict themselves, as those of many checkpoints do."""
    from transformers import GenerationConfig

    if not model.can_generate():
        yield
        return
    own, model.generation_config = model.generation_config, GenerationConfig.from_model_config(model.config)
    try:
        yield
    finally:
        model.generation_config = own


def save_as(checkpoint: Path, out: Path, name: str) -> None:
    """Write a folder of safetensors again, tensor by tensor, its floats in the type of that name of torch's."""
    import torch

    kind, weights = getattr(torch, name), find_weights(Listing.of(checkpoint))
    kinds: dict[str, dict[str, Kind]] = {file: {} for file in weights.files}
    for file, tensor_name, tensor in stream_tensors(checkpoint, weights, sealed=True):
        kinds[file][tensor_name] = (kind if tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape))
    for file, members in groupby(stream_tensors(checkpoint, weights, sealed=True), key=lambda member: member[0]):
        write_tensors(out / file, kinds[file], ((name, tensor.to(kinds[file][name][0])) for _, name, tensor in members))
    if weights.index is not None:
        size = sum(dtype.itemsize * math.prod(shape) for file in kinds.values() for dtype, shape in file.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(weights.index)}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    config = json.loads((checkpoint / CONFIG).read_text())
    config.pop("torch_dtype", None)
    (out / CONFIG).write_text(json.dumps(config | {"dtype": name}, indent=2) + "\n")
    copy_companions(checkpoint, out)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, out: Path, *, called: str | None = None) -> None:
    """Write a tokenizer that is in memory to `out`; raises CheckpointError where what was written is another one.

    called: what the error names, where a user does not know `out`.
    """
    tokenizer.save_pretrained(out)
    require_same_tokenizer(tokenizer, out, called=called)


def copy_companions(source: Path, out: Path) -> None:
    """All that a checkpoint carries beside configuration and weights, byte for byte; `out` has a config.json already.

    Replaces what is there. Raises CheckpointError where the tokenizer in `out` is another one then.
    """
    for name in companions(Listing.of(source).sizes):
        copy(source / name, out / name)
    require_same_tokenizer(source, out)


def copy_tokenizer(checkpoint: Path, out: Path) -> None:
    """The companions, and the configuration by which transformers knows the tokenizer's class. Replaces what is there."""
    copy(checkpoint / CONFIG, out / CONFIG)
    copy_companions(checkpoint, out)


def link_checkpoint(checkpoint: Path, out: Path) -> None:
    """Everything that transformers loads: configuration, weights, companions. Not a quantize stage's integers."""
    listing = Listing.of(checkpoint)
    weights = find_weights(listing)
    for name in needed_files(listing, weights):
        (link if name in weights.files else copy)(checkpoint / name, out / name)
    require_same_tokenizer(checkpoint, out)
