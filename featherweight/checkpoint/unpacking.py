"""Loading of checkpoints that are quantized already: plain float weights, and the integers beside them where a grid holds them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint import quantized_formats
from featherweight.checkpoint.files import CONFIG, INDEX, Listing, Weights, copy, needed_files
from featherweight.checkpoint.opening import skeleton
from featherweight.checkpoint.packed_layers import Found
from featherweight.checkpoint.quantized_formats import BESIDE
from featherweight.checkpoint.tensors import stream_tensors
from featherweight.model.matrices import heads
from featherweight.model.quantized_weights import QuantizedWeights
from featherweight.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder; empty where there is none that can be read, which others complain about."""
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def unpack(folder: Path, config: Mapping[str, Any], weights: Weights, out: Path, progress: Progress) -> dict[str, float]:
    """Write the checkpoint in `folder`, packed as `config` says, to `out` in the form of a quantize stage's.

    Weights on a grid keep their very integers (or float8 numbers) and scales. Others (zero points, act-order, FP8 in blocks,
    2 bits) become float weights only, of exactly the values that they stand for; a note says so. Returns `quantized_layers`,
    those on a grid, and `dequantized_layers`, the others. Raises CheckpointError for a format that is not known or damaged.
    """
    quantized_formats.require_readable(config, str(folder))
    method = str(quantized_formats.method_of(config))
    progress.note(f"unpacking {method} weights")
    tensors = {name: tensor for _, name, tensor in stream_tensors(folder, weights)}
    found = quantized_formats.read(config, tensors, str(folder))
    grids = found.grids()
    lost = [name for name in found.layers if name not in grids] + list(found.floats)
    _write_weights(folder, weights, found, out)
    plain = {key: value for key, value in config.items() if key != "quantization_config"} | {"dtype": "float32"}
    (out / CONFIG).write_text(json.dumps(plain, indent=2) + "\n")
    if grids:
        q = {name: found.layers[name].q for name in grids}
        scales = {name: found.layers[name].scales for name in grids}
        QuantizedWeights(grids, q, scales, method, heads(skeleton(out))).write(out)
    if lost:
        progress.note(f"{len(lost)} of {len(lost) + len(grids)} layers become float: {_reasons(found, lost)}")
    if rounded := quantized_formats.rounded_when_run(config["quantization_config"]):
        progress.note(f"{' and '.join(rounded)} are to be rounded when the model runs: here an engine does that, or nobody does")
    _take_rest(folder, weights, out)
    return {"quantized_layers": float(len(grids)), "dequantized_layers": float(len(lost))}


def _reasons(found: Found, lost: list[str]) -> str:
    reasons = (
        found.layers[name].obstacle() or "no grid of that width" if name in found.layers else "scales of blocks" for name in lost
    )
    return ", ".join(f"{reason} ({count})" for reason, count in sorted(Counter(reasons).items()))


def _write_weights(folder: Path, weights: Weights, found: Found, out: Path) -> None:
    """File by file, every quantized layer where its first part lay."""
    from safetensors.torch import save_file

    done: set[str] = set()
    shards: dict[str, str] = {}
    for file in weights.files:
        tensors: dict[str, Tensor] = {}
        for _, name, tensor in stream_tensors(folder, Weights((file,))):
            whole = f"{name.rpartition('.')[0]}.weight"
            if whole in found.layers and whole not in done:
                tensors[whole] = found.layers[whole].weight()
            elif whole in found.floats and whole not in done:
                tensors[whole] = found.floats[whole]
            if not BESIDE.search(name) and name not in found.layers and name not in found.floats:
                tensors[name] = tensor
            done.update(tensors)
        save_file(tensors, out / file, metadata={"format": "pt"})
        shards |= dict.fromkeys(tensors, file)
    if weights.index is not None:
        (out / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shards}, indent=1))


def _take_rest(folder: Path, weights: Weights, out: Path) -> None:
    for name in needed_files(Listing.of(folder), weights):
        if not (out / name).exists():
            copy(folder / name, out / name)
