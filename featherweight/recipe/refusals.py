"""Which combinations of stages make no sense, each with its reason in one line; what concerns an engine alone its Runtime is asked.

All is decided before anything runs: from the recipe, the machine, and what the checkpoint's folder tells where it can be read. A
checkpoint that is still to be pruned tells its kind but not its sizes, which are judged again by the stage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from featherweight.checkpoint.facts import kept_refusal
from featherweight.distillation.spec import DistillSpec
from featherweight.distillation.students import student_refusal
from featherweight.grid import Grid, grid_named
from featherweight.model.facts import CheckpointFacts
from featherweight.model.parent import Parent
from featherweight.model.positions import context_refusal
from featherweight.pruning.spec import PruneSpec
from featherweight.quantization.spec import QuantizeSpec
from featherweight.runtimes.alternatives import advised
from featherweight.runtimes.candidate import Candidate
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.interface import Grids
from featherweight.runtimes.spec import SIXTEEN_BITS, ComputeType, ServingSpec
from featherweight.spec import ModelSize, Task
from featherweight.system.device import CPU, CUDA, Device, cuda_refusal, seen_from
from featherweight.system.machine import Machine
from featherweight.training.lora import unknown_target
from featherweight.training.spec import sharded_zeros_refusal

FLOAT_BYTES = 4
"""Every stage holds the weights in float32."""
HALF_BYTES = 2


@dataclass(frozen=True)
class Chosen:
    """What a variant would be made by and served on; None for a stage that is left out.

    facts: of the checkpoint, student: of a student of its own; None where they are not known. where: the device of the run, and of
    its baseline. adapters: names of those that are to be kept beside the checkpoint.
    """

    task: Task
    distill: DistillSpec | None
    prune: PruneSpec | None
    quantize: QuantizeSpec | None
    serve: ServingSpec
    machine: Machine
    where: Device = CPU
    facts: CheckpointFacts | None = None
    student: CheckpointFacts | None = None
    adapters: tuple[str, ...] = ()

    @property
    def student_pruning(self) -> PruneSpec | None:
        """How the student of a distillation is pruned."""
        return self.distill.prune if self.distill else None

    @property
    def distilled(self) -> CheckpointFacts | None:
        """Of what the distillation leaves, trained, and so in float."""
        if self.distill is None:
            return self.facts
        known = self.student if self.distill.student else self.facts and self.facts.cut()
        return known and replace(known, quantized=None, grids=dict[str, Grid]())

    @property
    def pruned(self) -> CheckpointFacts | None:
        """Of what is quantized, or served as it is."""
        if self.prune is None or self.distilled is None:
            return self.distilled
        return replace(self.distilled.cut(), quantized=None, grids=dict[str, Grid]())

    def parent(self, facts: CheckpointFacts | None) -> Parent:
        """The checkpoint that a method is to change, known by `facts` or by the recipe alone."""
        return Parent.of(facts) if facts else Parent(self.task)

    @property
    def quantized(self) -> Parent:
        """What is known of the checkpoint that is quantized."""
        last = self.prune or self.student_pruning
        parent = self.parent(self.pruned)
        return replace(parent, sparse=parent.sparse or (last is not None and last.sparse))

    def obstacle(self) -> str | None:
        """What rules the combination out, in one line: the first of `REFUSALS` that applies; None where nothing does."""
        reason = self._obstacle()
        return reason and advised(reason, self.serve, lambda way: replace(self, serve=way)._obstacle() is None)

    def _obstacle(self) -> str | None:
        """The same, where the way out may be just another engine."""
        return next((reason for rule in REFUSALS if (reason := rule(self))), None)


def baseline_type(facts: CheckpointFacts | None, memory_bytes: int) -> ComputeType:
    """What the baseline is served in: float32, or the 16 bits that the checkpoint is stored in where memory is too small for it."""
    stored = facts.stored_half if facts else None
    if facts and stored and FLOAT_BYTES * facts.size.parameters > memory_bytes:
        return "float16" if stored == "float16" else "bfloat16"
    return "float32"


def memory_refusal(size: ModelSize, memory_bytes: int, numbers: ComputeType = "float32") -> str | None:
    """Why a machine with so much memory cannot hold the model at all, as its baseline is served; None where it can."""
    needed = (HALF_BYTES if numbers in SIXTEEN_BITS else FLOAT_BYTES) * size.parameters
    if needed <= memory_bytes:
        return None
    return (
        f"checkpoint: {size.parameters / 1e9:.1f} billion weights take {gib(needed)} in {numbers}, as the baseline is served, and "
        f"this machine has {gib(memory_bytes)} of memory; take a larger machine, or a smaller checkpoint"
    )


def disk_refusal(size: ModelSize, free_bytes: int) -> str | None:
    """Why a disk with so much room cannot take in even the checkpoint; None where it can."""
    needed = FLOAT_BYTES * size.parameters
    if needed <= free_bytes:
        return None
    return f"checkpoint: it takes {gib(needed)} in the workspace, and its disk has {gib(free_bytes)} free; free some, or set -w"


def gib(size: float) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.1f} GiB"


def task_refusal(task: Task, serve: ServingSpec) -> str | None:
    """Why the engine cannot serve a model for `task`, in one line; None where it can."""
    reason = RUNTIMES[serve.engine].task_refusal(task)
    return reason and f"{task} + {serve.engine}: {reason}"


def refusal(quantize: QuantizeSpec | None, serve: ServingSpec) -> str | None:
    """Why `serve` cannot or should not serve what `quantize` makes, in one line; None where it can.

    quantize: None for weights that are still in float.
    """
    reason = RUNTIMES[serve.engine].grids_refusal(_grids(quantize) if quantize else Grids(), serve)
    return f"{quantize.method}-{quantize.grid} + {serve.engine}: {reason}" if reason and quantize else reason


def _grids(quantize: QuantizeSpec) -> Grids:
    """What the weights that `quantize` makes lie on."""
    head, mixed = quantize.head, quantize.mixed
    return Grids(grid_named(quantize.grid), grid_named(head) if head else None, grid_named(mixed.grid) if mixed else None)


def shape_refusal(prune: PruneSpec | None, serve: ServingSpec) -> str | None:
    """Why `serve` gains nothing from layers of different widths, in one line; None where it does, or they are alike."""
    if prune is None or not prune.uneven or RUNTIMES[serve.engine].layers_may_differ:
        return None
    return (
        f"prune.scope global + {serve.engine}: it loads layers of one shape, and would serve the narrower ones filled up with "
        f"zeros, no smaller and no faster; take another engine, or scope: uniform"
    )


def machine_refusal(serve: ServingSpec, machine: Machine) -> str | None:
    """Why `machine` has no kernel for `serve`, in one line that names what it needs; None where it has, or may have."""
    return RUNTIMES[serve.engine].machine_refusal(serve, machine)


def _machine_refusal(chosen: Chosen) -> str | None:
    """Of an engine that serves from the device that was chosen: by that device alone, whatever else the machine has."""
    serve, device = chosen.serve, chosen.serve.served_on(chosen.where)
    elsewhere = RUNTIMES[serve.engine].device_refusal(serve, device, chosen.machine)
    return machine_refusal(serve, chosen.machine if elsewhere else seen_from(device, chosen.machine))


def _device_refusal(chosen: Chosen) -> str | None:
    """An engine that does not serve from the device: it would be compared with a baseline on another without a word."""
    serve, device = chosen.serve, chosen.serve.served_on(chosen.where)
    if device == CUDA and (reason := cuda_refusal(chosen.machine)):
        return f"{serve.engine} on {device}: {reason}"
    reason = RUNTIMES[serve.engine].device_refusal(serve, device, chosen.machine)
    if reason is None or serve.device != "auto":
        return reason
    return f"{reason}, and this run is on {device}; say device: {CPU if device == CUDA else CUDA} for it, or for the recipe"


def _distill_refusal(chosen: Chosen) -> str | None:
    if chosen.distill is None:
        return None
    reason = chosen.distill.refusal(chosen.parent(chosen.facts))
    return reason or (student_refusal(chosen.distill, chosen.facts, chosen.student) if chosen.facts else None)


def _quantize_refusal(chosen: Chosen) -> str | None:
    if chosen.quantize is None:
        return None
    return (kept_refusal(chosen.pruned) if chosen.pruned else None) or chosen.quantize.refusal(chosen.quantized)


def _context_refusal(chosen: Chosen) -> str | None:
    """Sequences of a stage that are longer than the model's context."""
    if chosen.facts is None:
        return None
    finetune = chosen.prune.finetune if chosen.prune else None
    asked = {"distill": chosen.distill, "prune": chosen.prune, "finetune": finetune, "quantize": chosen.quantize}
    told = (context_refusal(chosen.facts.config, spec.sequence, name) for name, spec in asked.items() if spec)
    return next((reason for reason in told if reason), None)


def _lora_refusal(chosen: Chosen) -> str | None:
    """Layers that adapters are asked for, and that the model does not have; llama.cpp's names are not the model's."""
    spec = chosen.prune.finetune if chosen.prune else None
    facts = chosen.facts
    if spec is None or spec.lora is None or facts is None or not facts.rows_and_columns or facts.quantized == "gguf":
        return None
    return unknown_target(spec.lora, sorted({*(name.split(".")[-2] for name in facts.rows_and_columns), "lm_head"}))


def _adapters_refusal(chosen: Chosen) -> str | None:
    """Adapters fit the matrices that they were trained beside, and few engines take any."""
    if not chosen.adapters:
        return None
    changed = "distill" if chosen.distill else "prune" if chosen.prune else None
    if changed:
        return f"checkpoint.adapters + {changed}: they fit the checkpoint as it is; merge one: its folder is the source"
    reason = RUNTIMES[chosen.serve.engine].adapters_refusal(chosen.serve)
    return reason and f"checkpoint.adapters + {chosen.serve.engine}: {reason}"


def _sharding_refusal(chosen: Chosen) -> str | None:
    """Training in parts of what has zeros to hold."""
    distill, finetune = chosen.distill, chosen.prune.finetune if chosen.prune else None
    student = chosen.student if distill and distill.student else chosen.facts
    if distill and distill.sharded and ((student and student.sparse) or (distill.prune and distill.prune.sparse)):
        return sharded_zeros_refusal("distill")
    parent = chosen.parent(chosen.distilled)
    if finetune and finetune.sharded and (parent.sparse or (chosen.prune and chosen.prune.sparse)):
        return sharded_zeros_refusal("finetune")
    return None


def _speculation_refusal(chosen: Chosen) -> str | None:
    reason = RUNTIMES[chosen.serve.engine].speculation_refusal(chosen.serve)
    return reason and f"speculation + {chosen.serve.engine}: {reason}"


def _grids_refusal(chosen: Chosen) -> str | None:
    """What the engine says of the grids; those that the checkpoint came with where nothing quantizes it."""
    kept = chosen.pruned.kept_grids if chosen.pruned and chosen.quantize is None else None
    if kept is None:
        return refusal(chosen.quantize, chosen.serve)
    reason = RUNTIMES[chosen.serve.engine].grids_refusal(Grids(*kept), chosen.serve)
    return f"{kept[0].name} + {chosen.serve.engine}: {reason}" if reason else None


def _model_refusal(chosen: Chosen) -> str | None:
    """What the engine says of the model itself."""
    facts = chosen.pruned
    if facts is None:
        return None
    columns = {name: columns for name, (_, columns) in facts.rows_and_columns.items()}
    even = chosen.quantize is not None and chosen.quantize.mixed is None
    grid = grid_named(chosen.quantize.grid) if chosen.quantize and even else None
    rows = {name: (grid, count) for name, count in columns.items()} if grid else {}
    candidate = Candidate(facts, chosen.serve.max_tokens, rows, chosen.serve.served_on(chosen.where))
    return candidate.refusal(RUNTIMES[chosen.serve.engine], chosen.serve)


REFUSALS: tuple[Callable[[Chosen], str | None], ...] = (
    lambda chosen: task_refusal(chosen.task, chosen.serve),
    _speculation_refusal,
    _adapters_refusal,
    _distill_refusal,
    lambda chosen: chosen.prune.refusal(chosen.parent(chosen.distilled)) if chosen.prune else None,
    _quantize_refusal,
    _context_refusal,
    _lora_refusal,
    _sharding_refusal,
    _grids_refusal,
    lambda chosen: shape_refusal(chosen.prune, chosen.serve),
    lambda chosen: shape_refusal(chosen.student_pruning, chosen.serve),
    _machine_refusal,
    _device_refusal,
    _model_refusal,
)
"""What rules a combination out, each with its reason in one line; the first that applies is told."""
