"""Scales by importance: what a column carries on the text, how it weighs errors, and who rounds by it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from featherweight.checkpoint import opening
from featherweight.grid import GRIDS, Grid, grid_named
from featherweight.progress import Progress
from featherweight.quantization.catalog import QUANTIZERS
from featherweight.quantization.imatrix import LEAST, importances
from featherweight.quantization.interface import QuantizationInput, round_to_nearest
from featherweight.quantization.spec import QuantizeSpec

EMBEDDING = "model.embed_tokens.weight"
INTEGERS = [grid for grid in GRIDS.values() if grid.kind == "int"]


def ids() -> torch.Tensor:
    return torch.randint(3, 60, (12, 16), generator=torch.Generator().manual_seed(0))


def test_the_importance_of_a_column_is_its_mean_square(tiny_checkpoint: Path) -> None:
    """In float64 by hand, for a matrix in a block and for the tied head, which stands under the embedding's name."""
    model = opening.load_model(tiny_checkpoint).double().eval()
    seen: dict[str, torch.Tensor] = {}
    for name in ("model.layers.1.mlp.down_proj", "lm_head"):
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, read, name=name: seen.__setitem__(name, read[0].flatten(0, 1)))
    with torch.no_grad():
        model(input_ids=ids())
    found = importances(opening.load_model(tiny_checkpoint), ids())
    for name, inputs in (
        ("model.layers.1.mlp.down_proj.weight", seen["model.layers.1.mlp.down_proj"]),
        (EMBEDDING, seen["lm_head"]),
    ):
        squares = inputs.square().mean(0)
        torch.testing.assert_close(found[name].double(), (squares / squares.mean()).clamp_min(LEAST), rtol=1e-4, atol=1e-7)
    named = dict(opening.load_model(tiny_checkpoint).named_parameters())
    assert set(found) == {name for name, weight in named.items() if weight.ndim == 2}


def weighed_error(grid: Grid, weight: torch.Tensor, scales: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """By the definition, in float64: one sum for each row."""
    return ((grid.dequantize(*grid.quantize(weight, scales)) - weight).double().square() * importance.double()).sum(1)


@pytest.mark.parametrize("grid", INTEGERS, ids=lambda grid: grid.name)
def test_scales_are_those_of_the_least_weighed_error(grid: Grid) -> None:
    draws = torch.Generator().manual_seed(0)
    weight, importance = torch.randn(8, 88, generator=draws), torch.rand(88, generator=draws).pow(6)
    found = grid.mse_scales(weight, importance)
    others = (grid.scales(weight), grid.mse_scales(weight))
    assert all(
        (weighed_error(grid, weight, found, importance) <= weighed_error(grid, weight, one, importance)).all() for one in others
    )
    assert torch.equal(grid.mse_scales(weight, torch.full((88,), 3.0)), others[1])
    if grid.bits == 4:
        assert weighed_error(grid, weight, found, importance).sum() < 0.9 * weighed_error(grid, weight, others[1], importance).sum()


def given(checkpoint: Path, **options: object) -> QuantizationInput:
    spec = QuantizeSpec.of(scale="imatrix", grid="int4-g32", head="int8-g32", **options)
    return QuantizationInput(spec, checkpoint, opening.load_model(checkpoint), ids(), checkpoint, 0, Progress())


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"method": "gptq"}, {"method": "autoround", "steps": 1}], ids=lambda one: one["method"])
def test_methods_start_from_the_scales(options: dict, tiny_checkpoint: Path) -> None:
    plain = round_to_nearest(given(tiny_checkpoint), given(tiny_checkpoint).tensors())
    found = QUANTIZERS[options["method"]].choose(given(tiny_checkpoint, **options)).quantized
    assert all(torch.equal(found.scales[name], scales) for name, scales in plain.scales.items())


def test_rounding_to_nearest_that_reads_text_is_judged_and_scanned_as_such() -> None:
    spec, plain = QuantizeSpec.of(scale="imatrix", mixed={"grid": "int8"}, grid="int4-g32"), QuantizeSpec.of(scale="mse")
    assert spec.calibrated and not plain.calibrated and QuantizeSpec.of(method="gptq").calibrated
    assert spec.sensitivity is not None and spec.sensitivity.scale == "mse"


def test_a_channel_that_carries_nothing_still_counts(tiny_checkpoint: Path) -> None:
    model = opening.load_model(tiny_checkpoint)
    model.model.layers[0].input_layernorm.weight.data[:3] = 0.0
    model.model.layers[1].input_layernorm.weight.data[:] = 0.0
    found = importances(model, ids())
    first, second = (found[f"model.layers.{layer}.self_attn.q_proj.weight"] for layer in (0, 1))
    assert (first[:3] == LEAST).all() and (first[3:] > LEAST).all() and (second == 1).all()
    assert grid_named("int4").mse_scales(model.lm_head.weight.detach()[:4], second).isfinite().all()
