"""AutoRound: its rounding and gradients are auto-round's, its steps the paper's, and zeros stay zeros."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight.checkpoint import opening
from featherweight.grid import GRIDS, grid_named
from featherweight.model.architecture import blocks
from featherweight.model.blockwise import BATCH, linears
from featherweight.progress import Progress
from featherweight.quantization.autoround import _Rounding
from featherweight.quantization.catalog import QUANTIZERS
from featherweight.quantization.interface import QuantizationInput, round_to_nearest
from featherweight.quantization.spec import QuantizeSpec
from tests.support.autoround_formula import Weights, reference_autoround

STEPS = 20
BLOCK = "model.layers.0"


def rounding_of(grid: str, columns: int = 88) -> _Rounding:
    """Of a random matrix whose rows end in a short group, with offsets and clips that it might have learned."""
    torch.manual_seed(0)
    weight = torch.randn(6, columns)
    made = _Rounding.of(weight, grid_named(grid), grid_named(grid).scales(weight))
    made.offset.data.uniform_(-0.5, 0.5)
    made.clip.data.uniform_(0.5, 1.0)
    return made


@pytest.mark.parametrize("grid", [name for name, grid in GRIDS.items() if grid.kind == "int"])
def test_what_is_seen_is_what_is_chosen(grid: str) -> None:
    made, rule = rounding_of(grid), grid_named(grid)
    q, scales = made.chosen()
    assert torch.equal(made.seen(), rule.dequantize(q, scales))
    assert q.dtype == torch.int8 and rule.qmin <= q.min() and q.max() <= rule.qmax
    plain = _Rounding.of(made.weight, rule, made.start)
    assert all(torch.equal(one, other) for one, other in zip(plain.chosen(), rule.quantize(made.weight), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["int4", "int4-g64", "int4-g128", "int8-full", "int8-g128"])
def test_rounding_and_its_gradients_are_those_of_auto_round(grid: str) -> None:
    """Where its integers and float32 scales are ours: no end of the grid at -7 or -127, no scales of float16."""
    from auto_round.data_type.int import quant_tensor_sym

    made, rule = rounding_of(grid, columns=200), grid_named(grid)
    offset, clip = (one.detach().clone().requires_grad_() for one in (made.offset, made.clip))
    theirs, scale, _ = quant_tensor_sym(
        made.weight,
        bits=rule.bits,
        group_size=rule.group_size or -1,
        v=rule._grouped(offset).flatten(0, 1),
        max_scale=clip.flatten(),
        scale_dtype=torch.float32,
        init_scale=made.start.flatten()[:, None],
    )
    upstream = torch.randn(6, 200)
    torch.testing.assert_close(made.seen(), theirs)
    torch.testing.assert_close(made.chosen()[1].flatten(), scale.flatten().detach())
    ours = torch.autograd.grad(made.seen(), (made.offset, made.clip), upstream)
    for one, other in zip(ours, torch.autograd.grad(theirs, (offset, clip), upstream), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def given(checkpoint: Path, grid: str, **options: Any) -> QuantizationInput:
    ids = torch.randint(3, 60, (24, 16), generator=torch.Generator().manual_seed(1))
    spec = QuantizeSpec.of(method="autoround", grid=grid, head=None, steps=STEPS, **options)
    return QuantizationInput(spec, checkpoint, opening.load_model(checkpoint), ids, checkpoint, 0, Progress())


@pytest.mark.slow
@pytest.mark.parametrize(("grid", "gain"), [("int4-g64", 0.7), ("int8-reduced", 1.0)])
def test_it_is_the_papers_descent_in_float64(grid: str, gain: float, tiny_checkpoint: Path) -> None:
    """On the first block, whose inputs no earlier rounding has touched, and by scales that no float16 moves."""
    asked = given(tiny_checkpoint, grid)
    found = QUANTIZERS["autoround"].choose(asked).quantized
    model, parts = opening.load_model(tiny_checkpoint).double().eval(), asked.calibration.split(BATCH)
    weights = {f"{name}.weight": linear.weight.detach() for name, linear in linears(blocks(model)[0]).items()}
    seen: list[torch.Tensor] = []
    model.get_submodule(BLOCK).register_forward_hook(lambda _, __, output: seen.append(output))

    def block(changed: Weights, batch: int) -> torch.Tensor:
        torch.func.functional_call(model, dict(changed), (), {"input_ids": parts[batch]})
        return seen.pop()

    targets = [block({}, batch).detach() for batch in range(len(parts))]
    draws, order = torch.Generator().manual_seed(0), list[int]()
    while len(order) < STEPS:
        order += reversed(torch.randperm(len(parts), generator=draws).tolist())
    expected = reference_autoround(weights, grid, block, targets, order[:STEPS])
    rule = grid_named(grid)
    same = [torch.isclose(found.dequantize(name).double(), expected[name], atol=1e-6).double().mean() for name in weights]
    plain = {name: rule.fake_quantize(weight.float()).double() for name, weight in weights.items()}

    def loss(changed: Weights) -> float:
        return sum((block(changed, batch) - target).square().mean().item() for batch, target in enumerate(targets))

    ours = loss({name: found.dequantize(name).double() for name in weights})
    assert sum(same) / len(same) > 0.97
    assert ours == pytest.approx(loss(expected), rel=0.02)
    assert ours < gain * loss(plain)


def test_what_ends_farther_than_plain_rounding_is_dropped_for_it(tiny_checkpoint: Path) -> None:
    """One step is half a grid's step long: it turns every weight over."""
    asked = given(tiny_checkpoint, "int4")
    asked = dataclasses.replace(asked, spec=asked.spec.model_copy(update={"steps": 1}))
    plain = round_to_nearest(asked, asked.tensors())
    found = QUANTIZERS["autoround"].choose(asked).quantized
    assert found.q.keys() == plain.q.keys() and all(torch.equal(q, plain.q[name]) for name, q in found.q.items())


@pytest.mark.slow
def test_zeros_stay_zeros(tiny_checkpoint: Path) -> None:
    """What is pruned stays so, however far an offset goes."""
    asked = given(tiny_checkpoint, "int4-g32")
    zeros = {name: torch.rand(one.weight.shape) < 0.5 for block in blocks(asked.model) for name, one in linears(block).items()}
    for name, where in zeros.items():
        asked.model.get_submodule(name).weight.data[where] = 0.0
    found = QUANTIZERS["autoround"].choose(asked).quantized
    assert all((found.q[f"{name}.weight"][where] == 0).all() for name, where in zeros.items())
    made = rounding_of("int4-g32")
    made.weight.zero_()
    made.offset.data.fill_(0.5)
    assert not made.chosen()[0].any()


@pytest.mark.slow
def test_gradients_are_kept_on_or_off_as_they_were(tiny_checkpoint: Path) -> None:
    asked = given(tiny_checkpoint, "int4")
    asked.model.train()
    QUANTIZERS["autoround"].choose(asked)
    assert torch.is_grad_enabled() and asked.model.training
    assert not any("forward" in vars(module) for module in asked.model.modules())
