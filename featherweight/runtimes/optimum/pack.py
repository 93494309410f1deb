"""Optimum's graphs with the weights that are served, in the folder that is served."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.checkpoint.files import Listing, link
from featherweight.progress import Metrics
from featherweight.runtimes.bounds import EXACT
from featherweight.runtimes.onnx import pack
from featherweight.runtimes.onnx.storage import save_together
from featherweight.runtimes.packing import QuantizedRows
from featherweight.runtimes.parity import Reference
from featherweight.store.served_folder import FILE, Serving

if TYPE_CHECKING:
    from featherweight.runtimes.writing import Source


RANGES = "ranges.json"


def pack_graphs(built: Path, out: Path, rows: QuantizedRows | None, how: pack.Products) -> None:
    """Write the float32 graphs in `built` to `out`, with quantized weights wherever `rows` knows them.

    Raises StageError where a quantized weight has no place in any of them.
    """
    import onnx_ir

    models = {path.name: onnx_ir.load(path) for path in sorted(built.glob("*.onnx"))}
    if rows is not None:
        for model in models.values():
            pack.pack_graph(model, rows, how)
        rows.require_all_used("Optimum")
    out.mkdir()
    save_together(models, out)
    if how.ranges:
        (out / RANGES).write_text(json.dumps({path: asdict(one) for path, one in how.ranges.items()}, indent=1))


def check_rounded(source: Source, served: Path) -> Metrics:
    """Parity where activations are rounded: the weights to the exact bound in a twin that leaves activations in float, then all.

    The reference of fixed ranges rounds activations by the same ones.
    """
    from featherweight.runtimes.torch.linear import InputRange
    from featherweight.runtimes.torch.static_ranges import simulated

    file = served / Serving.read(served).weights / RANGES
    ranges = {path: InputRange(**one) for path, one in json.loads(file.read_text()).items()} if file.is_file() else {}
    weights = check_weights(source.reference(), served)
    with simulated(source.model, ranges):
        reference = source.reference()
    source.release()
    return {**weights, **reference.check(served)}


def check_weights(reference: Reference, served: Path) -> Metrics:
    """Hold the packed weights to the exact bound, with a twin of the graphs that leaves activations in float."""
    twin, serving = served / "twin", Serving.read(served)
    (twin / serving.weights).mkdir(parents=True)
    for path in (served / serving.weights).iterdir():
        into = twin / serving.weights / path.name
        pack.in_float(path, into) if path.suffix == ".onnx" else link(path, into)
    for name in Listing.of(served).sizes.keys() - {FILE}:
        link(served / name, twin / name)
    serving.write(twin)
    measured = reference.check(twin, EXACT)
    shutil.rmtree(twin)
    return {"parity_weights_max_abs": measured["parity_max_abs"]}
