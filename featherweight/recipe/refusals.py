"""Which combinations of stages make no sense, each with its reason in one line; what concerns an engine alone its Runtime is asked.

All but `machine_refusal` is decided from the recipe alone, and all of it before anything runs.
"""

from __future__ import annotations

from featherweight.grid import grid_named
from featherweight.pruning.spec import PruneSpec
from featherweight.quantization.spec import QuantizeSpec
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.interface import Grids
from featherweight.runtimes.spec import ServingSpec
from featherweight.spec import Task
from featherweight.system.machine import Machine


def task_refusal(task: Task, serve: ServingSpec) -> str | None:
    """Why the engine cannot serve a model for `task`, in one line; None where it can."""
    reason = RUNTIMES[serve.engine].task_refusal(task)
    return reason and f"{task} + {serve.engine}: {reason}"


def refusal(quantize: QuantizeSpec | None, serve: ServingSpec) -> str | None:
    """Why `serve` cannot or should not serve what `quantize` makes, in one line; None where it can.

    quantize: None for weights that are still in float.
    """
    reason = RUNTIMES[serve.engine].grid_refusal(_grids(quantize) if quantize else Grids(), serve)
    return f"{quantize.method}-{quantize.grid} + {serve.engine}: {reason}" if reason and quantize else reason


def _grids(quantize: QuantizeSpec) -> Grids:
    """What the weights that `quantize` makes lie on."""
    head, mixed = quantize.head, quantize.mixed
    return Grids(grid_named(quantize.grid), grid_named(head) if head else None, grid_named(mixed.grid) if mixed else None)


def shape_refusal(prune: PruneSpec | None, serve: ServingSpec) -> str | None:
    """Why `serve` gains nothing from layers of different widths, in one line; None where it does, or they are alike."""
    if prune is None or not prune.uneven or RUNTIMES[serve.engine].layers_may_differ:
        return None
    able = " or ".join(name for name in RUNTIMES if RUNTIMES[name].layers_may_differ)
    return (
        f"prune.scope global + {serve.engine}: it loads layers of one shape, and would serve the narrower ones filled up with "
        f"zeros, no smaller and no faster; take {able}, or scope: uniform"
    )


def machine_refusal(serve: ServingSpec, machine: Machine) -> str | None:
    """Why `machine` has no kernel for `serve`, in one line that names what it needs; None where it has, or may have."""
    return RUNTIMES[serve.engine].machine_refusal(serve, machine)
