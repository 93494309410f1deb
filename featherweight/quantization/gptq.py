"""GPTQ (Frantar et al. 2022) through llm-compressor: each rounding error is made good by the columns still to be rounded."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from featherweight.grid import Grid, grid_named
from featherweight.model.parent import Parent, walking_refusal
from featherweight.model.quantized_weights import QuantizedWeights
from featherweight.progress import Progress
from featherweight.quantization import oneshot
from featherweight.quantization.interface import (
    Choice,
    QuantizationInput,
    Quantizer,
    calibration_operations,
    merged,
    round_to_nearest,
    start_scales,
)
from featherweight.quantization.spec import IMATRIX, QuantizeSpec
from featherweight.store.mapped import spilled

if TYPE_CHECKING:
    from torch import Tensor

OBSERVER = "featherweight"


class GptqSpec(QuantizeSpec):
    """Weights rounded column by column, on `samples` blocks of calibration text."""

    method: Literal["gptq"] = "gptq"


def refusal(spec: QuantizeSpec, parent: Parent) -> str | None:
    """Rounding on grids symmetric about zero maps zero to zero; GPTQ's updates move every weight."""
    if parent.sparse:
        return (
            f"sparse + {spec.method}-{spec.grid}: GPTQ makes rounding errors good in the weights still to come, and so fills the "
            "zeros; take rtn, or qat with start: rtn"
        )
    return walking_refusal("gptq", parent)


def choose(given: QuantizationInput[QuantizeSpec]) -> Choice:
    """Calibrate the Linear weights of the blocks; the embedding and the head, which have no Hessian, are rounded to nearest."""
    names = [name.removesuffix(".weight") for name in given.grids if name not in given.heads]
    (modifier,) = oneshot.run(given.model, lambda: [_modifier(given, names)], given.calibration)
    quantized = merged(modifier.found, round_to_nearest(given, given.head()))
    return Choice(quantized, metrics={"gptq_fallbacks": modifier.fallbacks})


def _modifier(given: QuantizationInput[QuantizeSpec], names: list[str]) -> Any:
    by_grid: dict[Grid, list[str]] = {}
    for name in names:
        by_grid.setdefault(given.grids[f"{name}.weight"], []).append(name)
    groups = {grid.name: scheme(grid, members, given.spec.scale) for grid, members in by_grid.items()}
    modifier = _modifier_class()(config_groups=groups, bypass_divisibility_checks=True)
    modifier.begin(given, names)
    return modifier


def scheme(grid: Grid, names: list[str], scale: str) -> dict[str, Any]:
    """llm-compressor's description of `grid` for the modules `names`: weights only, scales from our own observer."""
    observer = {"observer": _observer(), "observer_kwargs": {"grid": grid.name, "search": scale}}
    return {"targets": names, "weights": oneshot.weights_scheme(grid) | observer}


def _integers(grid: Grid, module: Any) -> tuple[Tensor, Tensor]:
    """The integers and scales that GPTQ left in a module, on our grid.

    llm-compressor lets symmetric integers reach -2^(b-1); where our grid ends one step earlier they are moved by that step.
    """
    return grid.quantize(module.weight.detach().cpu(), module.weight_scale.detach().float().cpu())


@cache
def _observer() -> str:
    """Register an observer that takes the scales from our Grid, signs included, and return its name."""
    import torch
    from llmcompressor.observers import Observer

    @Observer.register(OBSERVER)
    class GridObserver(Observer):
        _stats_attrs = ["grid_scales"]  # noqa: RUF012 (the library's own way)

        def update_statistics_from_observed(self, observed: torch.Tensor) -> None:
            raise NotImplementedError("scales are taken from the whole weight, in forward")

        @torch.no_grad()
        def forward(self, observed: torch.Tensor) -> Any:  # type: ignore[override]
            options = self.args.observer_kwargs
            self.grid_scales = start_scales(grid_named(options["grid"]), observed, options["search"])
            return self

        def get_qparams(self) -> Any:  # type: ignore[override]
            scale = self.grid_scales
            del self.grid_scales
            return {"scale": scale, "zero_point": torch.zeros_like(scale, dtype=torch.int8), "global_scale": None}

    return OBSERVER


@cache
def _modifier_class() -> Any:
    """llm-compressor's GPTQModifier, which takes down what each module comes to, how far it is, and what it rounded to nearest."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from pydantic import PrivateAttr

    class Gptq(GPTQModifier):
        fallbacks: int = 0
        _found: QuantizedWeights = PrivateAttr()
        _names: dict[str, None] = PrivateAttr()
        _grids: dict[str, Grid] = PrivateAttr()
        _progress: Progress = PrivateAttr()
        _room: Path | None = PrivateAttr()
        _importance: Mapping[str, Tensor] = PrivateAttr()

        def begin(self, given: QuantizationInput[QuantizeSpec], names: list[str]) -> None:
            self._names, self._grids, self._progress = dict.fromkeys(names), given.grids, given.progress
            self._found, self._room = QuantizedWeights({}, {}, {}, given.spec.method), given.room
            self._importance = given.importance

        @property
        def found(self) -> QuantizedWeights:
            return self._found

        def compress_module_list(self, module_list: list[Any]) -> None:
            for module in module_list:
                self._weigh(module)
            super().compress_module_list(module_list)
            for module in module_list:
                name = f"{self._module_names[module]}.weight"
                self._found.grids[name] = self._grids[name]
                made = _integers(self._grids[name], module)
                self._found.q[name], self._found.scales[name] = (spilled(one, self._room) for one in made)
            if module_list:
                self._progress.step(len(self._found.q), len(self._names))

        def _weigh(self, module: Any) -> None:
            """Choose the scales anew where errors are weighed: the observer does not know whose weight it is shown."""
            name = f"{self._module_names[module]}.weight"
            if (importance := self._importance.get(name)) is not None:
                scales = start_scales(self._grids[name], module.weight.detach(), IMATRIX, importance)
                module.weight_observer.grid_scales = scales

        def _log_rtn_fallback_summary(self) -> None:
            self.fallbacks = len(self._rtn_fallback_module_names)

    return Gptq


EXPECTED_LOSSES = {"int8": 0.0017, "int8-g32": 0.0006, "int4": 0.0403, "int4-g32": 0.0199, "fp8": 0.0018}

GPTQ = Quantizer(
    GptqSpec,
    choose,
    oneshot.LIBRARIES,
    refusal=refusal,
    operations=calibration_operations,
    starts_training=True,
    column_s=1e-3,
    losses=EXPECTED_LOSSES,
    streams=True,
)
