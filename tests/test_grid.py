"""Grids: what they round to, and that rounding again changes nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.errors import RecipeError
from featherweight.grid import GRIDS, Grid, grid_named

GRID = pytest.mark.parametrize("grid", GRIDS.values(), ids=list(GRIDS))
INTEGERS = {name: grid for name, grid in GRIDS.items() if grid.kind == "int"}
INTEGER_GRID = pytest.mark.parametrize("grid", INTEGERS.values(), ids=list(INTEGERS))


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """Matrices of awkward shapes and magnitudes, rows of zeros among them."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 150))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    magnitudes = 10.0 ** torch.randint(-12, 6, (rows, 1), generator=generator)
    return torch.randn(rows, columns, generator=generator) * magnitudes * torch.randint(0, 2, (rows, 1), generator=generator)


@pytest.mark.slow
@GRID
@settings(max_examples=40, deadline=None)
@given(weight=weights())
def test_rounding_a_second_time_changes_nothing(grid: Grid, weight: torch.Tensor) -> None:
    q, scales = grid.quantize(weight)
    again, _ = grid.quantize(grid.dequantize(q, scales), scales)
    assert torch.equal(q, again)
    if not grid.half_scales or scales.abs().min() >= torch.finfo(torch.float16).smallest_normal:
        # Where float16 has fewer digits the largest weight is no longer the last integer, and other scales would be chosen.
        assert grid.fake_quantize(grid.dequantize(q, scales)).allclose(grid.dequantize(q, scales), rtol=1e-6)


@pytest.mark.slow
@INTEGER_GRID
@settings(max_examples=40, deadline=None)
@given(weight=weights())
def test_no_weight_is_off_by_more_than_half_a_step(grid: Grid, weight: torch.Tensor) -> None:
    q, scales = grid.quantize(weight)
    assert q.dtype == torch.int8
    assert scales.dtype == torch.float32
    assert q.shape == weight.shape
    assert scales.shape == (len(weight), grid.groups(weight.shape[1]))
    assert q.min() >= grid.qmin
    assert q.max() <= grid.qmax
    steps = scales.abs().repeat_interleave(grid.group_size or weight.shape[1], dim=1)[:, : weight.shape[1]]
    # A lopsided grid lacks the point opposite its end, so that a second weight as large as the largest is cut to it.
    slack = 1.0 if grid.qmin < -grid.qmax else 0.5
    assert ((grid.dequantize(q, scales) - weight).abs() <= slack * steps * (1 + 1e-5)).all()


@GRID
def test_the_largest_weight_of_a_group_is_kept(grid: Grid) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    size = grid.group_size or 64
    for group in weight.split(size, dim=1):
        largest = group.abs().argmax(dim=1, keepdim=True)
        kept = grid.fake_quantize(group).gather(1, largest)
        assert kept.allclose(group.gather(1, largest), rtol=2**-10 if grid.half_scales else 1e-6)


@pytest.mark.parametrize("name", ["int8-g32", "int4-g32"])
def test_the_scales_of_blocks_are_float16_numbers_that_cut_nothing_off(name: str) -> None:
    magnitudes = torch.tensor([1e-12, 1e-6, 1e-3, 1.0, 1e5])[:, None]
    weight = torch.randn(5, 96, generator=torch.Generator().manual_seed(0)) * magnitudes
    grid = grid_named(name)
    exact = weight.view(5, 3, 32).abs().amax(-1) / -grid.qmin
    for scales in (grid.scales(weight), grid.mse_scales(weight)):
        assert torch.equal(scales.half().float(), scales)
    assert (grid.scales(weight).abs() >= exact).all()


@pytest.mark.slow
@GRID
@settings(max_examples=20, deadline=None)
@given(weight=weights())
def test_the_search_never_does_worse_than_the_largest_weight(grid: Grid, weight: torch.Tensor) -> None:
    def error(scales: torch.Tensor) -> torch.Tensor:
        return (grid.dequantize(*grid.quantize(weight, scales)) - weight).double().square().sum(dim=1)

    assert (error(grid.mse_scales(weight)) <= error(grid.scales(weight)) * (1 + 1e-6)).all()


def test_the_search_helps_where_few_bits_meet_a_tail() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    grid = grid_named("int4")
    found = grid.dequantize(*grid.quantize(weight, grid.mse_scales(weight)))
    assert (found - weight).square().mean() < 0.9 * (grid.fake_quantize(weight) - weight).square().mean()


@settings(max_examples=40, deadline=None)
@given(weight=weights())
def test_float8_is_off_by_at_most_a_sixteenth(weight: torch.Tensor) -> None:
    """e4m3 has 3 bits of fraction, and steps of 2^-9 below its smallest normal number."""
    grid = grid_named("fp8")
    q, scales = grid.quantize(weight)
    assert (q.dtype, q.shape) == (torch.float8_e4m3fn, weight.shape)
    assert q.float().abs().max() <= 448
    error = (grid.dequantize(q, scales) - weight).abs()
    assert (error <= (weight.abs() / 16).maximum(scales * 2.0**-10) * (1 + 1e-5)).all()


def test_a_short_last_group_has_a_scale_of_its_own() -> None:
    grid = grid_named("int4-g32")
    weight = torch.cat([torch.full((1, 32), 100.0), torch.full((1, 8), 1.0)], dim=1)
    assert grid.fake_quantize(weight).allclose(weight)
    assert grid.groups(40) == 2
    assert grid.bits_per_weight(64) == 5.0


@pytest.mark.parametrize(("name", "hint"), [("int4g32", "did you mean 'int4-g32'"), ("nf4", "known: int8, int8-reduced, ")])
def test_an_unknown_grid_names_the_nearest_one_or_all(name: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=f"unknown grid '{name}'; {hint}"):
        grid_named(name)


def test_grids_are_ordered_from_coarse_to_fine() -> None:
    names = ["int4", "int4-g128", "int4-g32", "fp8", "int8-reduced", "int8", "int8-full", "int8-g128", "int8-g32"]
    assert sorted(names, key=lambda name: GRIDS[name].fineness) == names
