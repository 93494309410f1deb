"""A checkpoint in, what AOTInductor serves out: compiled graphs, their weights in safetensors, and a manifest of both.

It runs in a process of its own, as TVM's does. What it says: see build_process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.model.architecture import family_of
from featherweight.runtimes.build_process import build_here
from featherweight.runtimes.code_levels import level
from featherweight.system.child_process import Channel
from featherweight.system.machine import describe

if TYPE_CHECKING:
    from torch import Tensor
    from torch.export import ExportedProgram

WEIGHTS, MANIFEST = "weights.safetensors", "manifest.json"
KNOWN_VECTORS = {"cpp.vec_isa_ok": True}
"""PyTorch need not compile a program for each kind of vectors to learn which this CPU has: its level is known by then."""
COMMON = {
    "aot_inductor.package": True,
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.package_constants_on_disk_format": "pickle_weights",  # hands them over; no pickle is written here
    "aot_inductor.precompile_headers": False,
    **KNOWN_VECTORS,
    "cpp.dynamic_threads": True,
    "compile_threads": 1,
}
PACKED = {"freezing": True, "max_autotune_gemm": True, "max_autotune_gemm_backends": "CPP"}
"""Products of few rows by Inductor's own kernels, with packed weights: 2 to 3 times MKL's speed. For many rows they are slower."""
CAPABILITIES = {"x86-64-v4": "avx512", "x86-64-v3": "avx2"}
"""By level of x86-64: which vectors Inductor writes code for (ATEN_CPU_CAPABILITY)."""


def build(checkpoint: Path, out: Path, channel: Channel) -> None:
    """Write graphs, weights and manifest to the folder `out`."""
    import torch
    from safetensors.torch import save_file

    from featherweight.runtimes.parity import load_reference
    from featherweight.runtimes.torch_aoti import graph

    channel.send({"note": "tracing the graphs"})
    made_for, model = level(describe()), load_reference(checkpoint)
    layers = graph.layer_shapes(model) if family_of(model.config) == "causal" else None
    store: dict[str, Tensor] = {}
    views: dict[str, Any] = {}
    for name, program in graph.programs(model, layers).items():
        channel.send({"note": f"compiling its {name} graph for {made_for}"})
        found = _compiled_step(program, made_for) if name == "step" else _compiled(program, made_for)
        views[name] = _packaged(found, out / f"{name}.pt2", store)
    save_file(store, out / WEIGHTS)
    told = {"torch": torch.__version__, "made_for": made_for, "layers": [asdict(one) for one in layers or []]}
    (out / MANIFEST).write_text(json.dumps(told | {"tables": _tables(model), "constants": views}, indent=1))


def _compiled(program: ExportedProgram, made_for: str, options: Mapping[str, Any] = {}) -> list[Any]:
    """The files of a graph, and its weights."""
    from torch._inductor import aot_compile

    told = {**COMMON, "cpp.march": made_for, **options}
    found: Any = aot_compile(program.module(check_guards=False), *program.example_inputs, options=told)
    return list(found)


def _compiled_step(program: ExportedProgram, made_for: str) -> list[Any]:
    """The same with packed weights; where a product has none, as of soft caps, Inductor tries PyTorch's own kernels beside its."""
    from torch._inductor.exc import InductorError

    try:
        return _compiled(program, made_for, PACKED)
    except InductorError:
        return _compiled(program, made_for, PACKED | {"max_autotune_gemm_backends": "CPP,ATEN"})


def _packaged(found: list[Any], package: Path, store: dict[str, Tensor]) -> Any:
    """Write the package of a graph, and put its weights into `store`; returns constants.Views."""
    from torch._inductor.package import package_aoti

    from featherweight.runtimes.torch_aoti import constants

    files: list[Any] = [file for file in found if isinstance(file, str)]
    weights = next(file for file in found if not isinstance(file, str))
    package_aoti(str(package), files)
    wrapper = next(Path(file).read_text() for file in files if file.endswith(".wrapper.cpp"))
    return constants.stored({name: tensor for name, (tensor, _) in weights.items()}, constants.unread(wrapper), store)


def _tables(model: Any) -> list[str]:
    """Parameters of which a token reads a row, by all their names in a graph."""
    from torch import nn

    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return [f"model.{name}" for name, one in model.named_parameters(remove_duplicate=False) if id(one) in tables]


if __name__ == "__main__":
    sys.exit(build_here(build, "manifest"))
