"""A checkpoint in, what TVM serves out: the library, its parameters in safetensors, and a manifest that says how they are called.

It runs in a process of its own, since a compiler that fails may take its process along. What it says: see build_process.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.runtimes.build_process import build_here
from featherweight.runtimes.code_levels import level
from featherweight.runtimes.tvm.library import opened, width
from featherweight.system.child_process import Channel
from featherweight.system.machine import describe

if TYPE_CHECKING:
    from torch.export import ExportedProgram

LIBRARY, PARAMETERS, MANIFEST = "model.so", "parameters.safetensors", "manifest.json"


def build(checkpoint: Path, out: Path, channel: Channel) -> None:
    """Write library, parameters and manifest to the folder `out`."""
    tvm = opened(compiler=True)
    from featherweight.model.quantized_weights import QuantizedWeights
    from featherweight.runtimes.parity import load_reference
    from featherweight.runtimes.tvm import graph, relax

    channel.send({"note": "tracing the graph"})
    made_for, model = level(describe()), load_reference(checkpoint)
    shape = graph.cache_shape(model)
    tables = _tables(model)
    graph.pack(model, width(made_for), QuantizedWeights.read(checkpoint))
    program = graph.exported(model, shape)
    channel.send({"note": "translating the graph"})
    module = relax.translated(program)
    channel.send({"note": f"compiling for {made_for}"})
    relax.compiled(module, made_for).export_library(str(out / LIBRARY))
    _write_parameters(program, out)
    told = {"tvm": tvm.__version__, "made_for": made_for, "cache": asdict(shape), "tables": tables}
    (out / MANIFEST).write_text(json.dumps(told | {"parameters": [name for name, _ in program.named_parameters()]}, indent=1))


def _tables(model: Any) -> list[str]:
    """Parameters of which a token reads a row, by their names in the graph."""
    from torch import nn

    return [f"model.{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)]


def _write_parameters(program: ExportedProgram, out: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.detach().clone() for name, tensor in program.named_parameters()}, out / PARAMETERS)


if __name__ == "__main__":
    sys.exit(build_here(build, "library"))
