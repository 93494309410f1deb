"""Writing the folder that OpenVINO serves: the toolchain makes the graph, with the integers of a quantize stage in it."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.checkpoint.files import CONFIG, Listing, copy, link
from featherweight.checkpoint.saving import copy_tokenizer, save_model
from featherweight.errors import StageError
from featherweight.grid import GRIDS
from featherweight.model.architecture import attention_options, task_of
from featherweight.model.heads import by_last_token
from featherweight.progress import Metrics
from featherweight.runtimes.bounds import EXACT
from featherweight.runtimes.build_process import other_python, run_build
from featherweight.runtimes.openvino import convert
from featherweight.runtimes.openvino.loaded import CONTINUOUS, MODEL
from featherweight.store.served_folder import FILE, Serving
from featherweight.system.toolchains import python

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from featherweight.runtimes.openvino.runtime import OpenvinoSpec
    from featherweight.runtimes.parity import Reference
    from featherweight.runtimes.writing import Source

FOLDER = "openvino"
ROUNDED_HERE = {"int8": ("int8", "int8"), "int4": ("int4-g32", "int8")}
"""Grids of the blocks and of embedding and head, by precision, where no quantize stage chose them."""


def write(spec: OpenvinoSpec, source: Source, out: Path) -> None:
    """See Runtime.write."""
    if spec.precision != "float32":
        source.round(*(GRIDS[name] for name in ROUNDED_HERE[spec.precision]))
    with tempfile.TemporaryDirectory(dir=out) as folder:
        checkpoint = Path(folder)
        save_model(source.model, checkpoint)
        if source.quantized:
            source.quantized.write(checkpoint)
        _forget_quantizer(checkpoint)
        (out / FOLDER).mkdir()
        command = [str(python("openvino")), str(Path(convert.__file__).resolve()), str(checkpoint), str(out / FOLDER / MODEL)]
        command += ["--task", task_of(source.config), *_attention(source.config)]
        command += ["--every-token"] if by_last_token(source.config) else []
        if error := run_build("OpenVINO", "graph", command, other_python(), source.progress):
            raise StageError(f"OpenVINO cannot take this checkpoint ({error}); take another engine")
    copy_tokenizer(source.checkpoint, out)
    copy(out / CONFIG, out / FOLDER / CONFIG)  # OpenVINO GenAI looks for it beside the graph
    options: dict[str, str] = {"batching": spec.batching} if spec.batching == CONTINUOUS else {}
    options |= {"activations": spec.activations} if source.quantized else {}
    Serving("openvino", FOLDER, options, source.grid).write(out)


def _attention(config: PreTrainedConfig) -> list[str]:
    """What the converter is told of the attention: nothing where PyTorch's fused kernel leaves nothing out."""
    return [f"--attention={told}" for told in attention_options(config).values()]


def _forget_quantizer(checkpoint: Path) -> None:
    """What quantized the checkpoint before it came is no business of who loads its floats."""
    path = checkpoint / CONFIG
    told = {name: value for name, value in json.loads(path.read_text()).items() if name != "quantization_config"}
    path.write_text(json.dumps(told, indent=1))


def check_weights(reference: Reference, served: Path) -> Metrics:
    """Hold the packed weights to the exact bound, in the same graph with activations, keys and values in float."""
    twin, serving = served / "twin", Serving.read(served)
    (twin / serving.weights).mkdir(parents=True)
    for path in (served / serving.weights).iterdir():
        link(path, twin / serving.weights / path.name)
    for name in Listing.of(served).sizes.keys() - {FILE}:
        link(served / name, twin / name)
    replace(serving, options={}).write(twin)
    measured = reference.check(twin, EXACT)
    shutil.rmtree(twin)
    return {"parity_weights_max_abs": measured["parity_max_abs"]}
