"""OpenVINO, declared: decoders and encoders as graphs of its own, in float32 or in integers of 8 and 4 bits, on CPUs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from featherweight.grid import GRIDS
from featherweight.model.architecture import attention_options, family_of
from featherweight.model.parent import experts_refusal
from featherweight.model.positions import rotary_kinds
from featherweight.progress import Metrics
from featherweight.runtimes.bounds import EXACT, INT8_ACTIVATIONS, Bound
from featherweight.runtimes.interface import Grids, Runtime
from featherweight.runtimes.refusals import (
    float_of_rounded_refusal,
    fp8_refusal,
    keys_and_values_refusal,
    other_layers_refusal,
)
from featherweight.runtimes.spec import CompileSpec
from featherweight.spec import Task
from featherweight.store.served_folder import Serving
from featherweight.system.device import Device
from featherweight.system.machine import Machine

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from featherweight.runtimes.bytes_read import HeldTensor
    from featherweight.runtimes.candidate import Candidate
    from featherweight.runtimes.offers import Offer
    from featherweight.runtimes.writing import Source

BITS = {"int8": 8, "int4": 4}
BY_LENGTH = frozenset({"dynamic", "longrope"})
"""Rotary embeddings that are others for longer texts: a traced graph has those of one length."""


FROZEN = {
    **dict.fromkeys(("funnel", "longformer", "reformer"), "cuts or pads each text to whole blocks"),
    "blt": "cuts each text into patches",
    **dict.fromkeys(("tapas", "yoso"), "counts rows by each text"),
    **dict.fromkeys(("dbrx", "longcat_flash"), "asks each text which experts it needs"),
    "jetmoe": "reads the weights of the experts that were chosen",
    "aria_text": "multiplies with experts by an operation that OpenVINO does not know",
    **dict.fromkeys(("flaubert", "xlm"), "uses an operation that OpenVINO does not know"),
}
"""What model types compute by each text, of which a trace keeps that of one, or nothing."""


class OpenvinoSpec(CompileSpec):
    """precision: rounds here only where no quantize stage chose the weights (embedding and head to int8).
    activations: rounded weights are multiplied with activations that are rounded too, int8 in groups of 32, or with floats.
    batching: continuous has OpenVINO GenAI write the texts, each making room for the next as it ends.
    """

    engine: Literal["openvino"]
    precision: Literal["float32", "int8", "int4"] = "float32"
    activations: Literal["int8", "float"] = "int8"
    batching: Literal["static", "continuous"] = "static"


class Openvino(Runtime[OpenvinoSpec]):
    """Everything that is known of it. Metrics of what is rounded at run time also have `parity_weights_max_abs`, of floats."""

    name = "openvino"
    spec = OpenvinoSpec
    loads_with = "featherweight.runtimes.openvino.loaded:OpenvinoModel"
    libraries = ("torch", "transformers")
    toolchain = "openvino"
    toolchain_libraries = ("openvino", "openvino-genai", "torch", "transformers")
    speculates = ("ngram",)
    writing_s = 30
    weight_s = 1e-7

    def write(self, spec: OpenvinoSpec, source: Source, out: Path) -> None:
        from featherweight.runtimes.openvino.write import write

        write(spec, source, out)

    def check(self, spec: OpenvinoSpec, source: Source, served: Path) -> Metrics:
        from featherweight.runtimes.openvino.write import check_weights

        reference = source.reference()
        source.release()
        exact = self.bound(Serving.read(served)) == EXACT
        return {**({} if exact else check_weights(reference, served)), **reference.check(served)}

    def bound(self, serving: Serving) -> Bound:
        """Floats 0.00004 nats at most; activations rounded to int8 in groups of 32, 0.060 on average (stories15M)."""
        return INT8_ACTIVATIONS if serving.options.get("activations") == "int8" else EXACT

    def held_tensors(self, folder: Path, serving: Serving, config: PreTrainedConfig) -> Iterator[HeldTensor]:
        from featherweight.runtimes.openvino.bytes_read import graph_tensors
        from featherweight.runtimes.openvino.loaded import MODEL

        return graph_tensors(folder / MODEL)

    def offers(self, device: Device, machine: Machine) -> Iterator[Offer]:
        from featherweight.runtimes.openvino.offers import offers

        return offers(device, machine)

    def task_refusal(self, task: Task) -> str | None:
        if task != "text2text-generation":
            return None
        return "it is written for decoders and encoders here, not for both in one; take another engine"

    def grid_refusal(self, grids: Grids, spec: OpenvinoSpec) -> str | None:
        body = grids.body
        if body is None:
            return None
        if spec.precision == "float32":
            return float_of_rounded_refusal("float32")
        if any(grid and grid.kind == "float" for grid in (body, grids.head, grids.finer)):
            return fp8_refusal()
        if BITS[spec.precision] != body.bits:
            return f"the weights are on a {body.bits}-bit grid, and precision {spec.precision} would round them again"
        return None

    def speculation_refusal(self, spec: OpenvinoSpec) -> str | None:
        """Rounded to int8, a token's activations depend on how many others pass with it (OpenVINO 2026.4: other texts)."""
        if spec.speculation and spec.batching == "static":
            return "it is OpenVINO GenAI that drafts tokens; say batching: continuous"
        if spec.speculation and spec.precision != "float32" and spec.activations == "int8":
            return "with activations in int8 OpenVINO writes another text where several tokens pass at once; say activations: float"
        return super().speculation_refusal(spec)

    def model_refusal(self, spec: OpenvinoSpec, model: Candidate) -> str | None:
        """Rotary embeddings that a trace freezes; rows that groups do not divide, of which OpenVINO knows no shorter last one."""
        if reason := _kept_refusal(model.config):
            return reason
        kind = model.facts.model_type
        if kind in FROZEN:
            return f"OpenVINO's graph is a trace, and transformers' {kind} {FROZEN[kind]}; take another engine"
        if changing := rotary_kinds(model.config) & BY_LENGTH:
            return (
                f"OpenVINO's graph is traced at one length, and this {kind}'s rotary embeddings "
                f"({min(changing)}) are others for longer texts; take another engine"
            )
        if spec.batching == "continuous" and (reason := _batching_refusal(model.config)):
            return reason
        if spec.precision == "float32":
            return None
        return experts_refusal(model.facts) or _groups_refusal(spec, model)


def _kept_refusal(config: PreTrainedConfig) -> str | None:
    """Decoders that keep something else than keys and values."""
    return keys_and_values_refusal("OpenVINO", config) or other_layers_refusal("OpenVINO", config)


def _batching_refusal(config: PreTrainedConfig) -> str | None:
    """What OpenVINO GenAI does not write: it pages the keys and values of PyTorch's fused attention alone."""
    if family_of(config) == "encoder":
        return "batching: OpenVINO GenAI writes texts, and an encoder answers at once; leave it out"
    if attention_options(config):
        return f"batching: OpenVINO GenAI pages fused attention, without the soft cap of a {config.model_type}; leave it out"
    return None


def _groups_refusal(spec: OpenvinoSpec, model: Candidate) -> str | None:
    from featherweight.runtimes.openvino.write import ROUNDED_HERE

    here = GRIDS[ROUNDED_HERE[spec.precision][0]]
    rows = model.rows or {name: (here, columns) for name, (_, columns) in model.facts.rows_and_columns.items()}
    for name, (grid, columns) in rows.items():
        size = grid.group_size or 1
        if columns % size or (grid.bits == 4 and columns % 2):
            return f"OpenVINO wants groups of one size, and {grid.name} leaves a shorter one of {name}'s {columns} columns"
    return None


OPENVINO = Openvino()
