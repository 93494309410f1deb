"""A checkpoint in, what TorchScript serves out: its graphs with their weights in one file, and a manifest.

It runs in a process of its own: a trace takes the model's attention out, and leaves much behind. What it says: see build_process.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.opening import load_config
from featherweight.model.architecture import family_of
from featherweight.runtimes.build_process import build_here
from featherweight.runtimes.torch.storage import FILE as PACKED
from featherweight.store.artifact import file_sha256
from featherweight.store.served_folder import Serving
from featherweight.system.child_process import Channel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from featherweight.runtimes.bytes_read import HeldTensor

MODEL, MANIFEST = "model.pt", "manifest.json"
ROUNDED = "torch-dynamic"
"""The engine of PyTorch whose layers the graphs of rounded weights have."""


def build(checkpoint: Path, out: Path, channel: Channel) -> None:
    """Write graphs and manifest to the folder `out`. checkpoint: of float weights, or as torch-dynamic serves it."""
    import torch

    from featherweight.runtimes.torch.linear import saturates
    from featherweight.runtimes.torch_aoti.graph import layer_shapes
    from featherweight.runtimes.torchscript.graph import traced

    channel.send({"note": "tracing the graphs"})
    model = _model(checkpoint)
    layers = layer_shapes(model) if family_of(model.config) == "causal" else None
    module = traced(model, layers)
    channel.send({"note": "writing the graphs"})
    torch.jit.save(module, str(out / MODEL))
    told = {"torch": torch.__version__, "sha256": file_sha256(out / MODEL), "saturates": saturates()}
    held = [asdict(one) for one in _held(checkpoint)]
    (out / MANIFEST).write_text(json.dumps(told | {"layers": [asdict(one) for one in layers or []], "held": held}, indent=1))


def _model(checkpoint: Path) -> Any:
    from featherweight.runtimes.parity import load_reference
    from featherweight.runtimes.torch import pack

    return pack.load(checkpoint, ROUNDED) if (checkpoint / PACKED).is_file() else load_reference(checkpoint)


def _held(checkpoint: Path) -> Iterator[HeldTensor]:
    from featherweight.runtimes.bytes_read import checkpoint_tensors
    from featherweight.runtimes.torch.bytes_read import packed_tensors
    from featherweight.runtimes.torch.formats import FORMATS

    config = load_config(checkpoint)
    if (checkpoint / PACKED).is_file():
        return packed_tensors(checkpoint, FORMATS[ROUNDED], config)
    return checkpoint_tensors(checkpoint, Serving("torchscript"), config)


if __name__ == "__main__":
    sys.exit(build_here(build, "manifest"))
