"""Sparse pruning: each criterion against its paper's formula in float64, all families, and zeros that stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight.checkpoint import opening
from featherweight.errors import StageError
from featherweight.model.architecture import LAYOUTS, blocks, family_of
from featherweight.model.blockwise import linears, visits
from featherweight.pruning import sparse
from featherweight.pruning.sparse import Target, sparsify
from featherweight.text.model_inputs import unpadded_inputs
from tests.support.families import FAMILIES, alone_inputs, family_checkpoint
from tests.support.families import tiny_model as tiny_model_of

HALF, TWO_OF_FOUR, ONE_OF_FOUR = Target(0.5), Target(0.5, 2, 4), Target(0.75, 1, 4)
CRITERIA = ("magnitude", "wanda", "sparsegpt")


def tiny_model(model_type: str) -> Any:
    return tiny_model_of(model_type, vocab_size=64)


def example_ids(model: Any, count: int = 6, length: int = 12) -> torch.Tensor:
    """Random blocks as `model` reads them; some seq2seq sources and targets end in padding."""
    whole = family_of(model.config) != "causal"
    ids = torch.randint(5, model.config.vocab_size, (count, 2 * length if whole else length), generator=seeded())
    if model.config.is_encoder_decoder:
        ids[0, length - 4 : length], ids[1, -5:] = 0, 0
    return ids


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def correlated(tokens: int, channels: int) -> torch.Tensor:
    """Activations as transformers have them: channels of very different size that go together."""
    mix = torch.randn(channels, channels, generator=seeded(1))
    sizes = torch.logspace(-1, 1, channels)[torch.randperm(channels, generator=seeded(2))]
    return torch.randn(tokens, channels, generator=seeded(3)) @ mix * sizes


def alone(weight: torch.Tensor, inputs: torch.Tensor, criterion: str, target: Target) -> torch.Tensor:
    """The pruned weight of one matrix that reads `inputs`, through the very functions that the blocks go through."""
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    if criterion == "magnitude":
        return sparse.magnitude(linear.weight, target)
    watched = type("Visit", (), {"block": Fake(linear), "watch": lambda self, see: [see(linear, x) for x in inputs.split(100)]})()
    {"wanda": sparse.by_wanda, "sparsegpt": sparse.by_sparsegpt}[criterion](watched, target)
    return linear.weight.detach()


class Fake:
    """A block that is one matrix."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        self.name, self.module = "block", torch.nn.Sequential(linear)


def keep_largest(scores: torch.Tensor, target: Target) -> torch.Tensor:
    """Mask of what a row keeps of its `scores`, by plain sorting."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    width = target.of or scores.shape[1]
    kept = target.kept or scores.shape[1] - int(scores.shape[1] * target.share)
    for row in range(len(scores)):
        for start in range(0, scores.shape[1], width):
            order = sorted(range(start, start + width), key=lambda column: -float(scores[row, column]))
            mask[row, order[:kept]] = True
    return mask


@pytest.fixture
def matrix() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [24, 64], and what it reads [400, 64]."""
    return torch.randn(24, 64, generator=seeded(4)), correlated(400, 64)


def test_magnitude_takes_the_smallest_of_the_matrix(matrix: tuple[torch.Tensor, torch.Tensor]) -> None:
    weight, inputs = matrix
    threshold = weight.double().abs().flatten().sort().values[weight.numel() // 2]
    assert torch.equal(alone(weight, inputs, "magnitude", HALF), weight * (weight.abs() >= threshold))


@pytest.mark.parametrize("target", [TWO_OF_FOUR, ONE_OF_FOUR, Target(0.25, 6, 8)], ids=lambda target: target.pattern)
def test_magnitude_takes_the_smallest_of_every_group(matrix: tuple[torch.Tensor, torch.Tensor], target: Target) -> None:
    weight, inputs = matrix
    kept = keep_largest(weight.double().abs(), target)
    assert torch.equal(alone(weight, inputs, "magnitude", target), weight * kept)


@pytest.mark.parametrize("target", [HALF, TWO_OF_FOUR, ONE_OF_FOUR], ids=lambda target: target.pattern)
def test_wanda_compares_weight_times_input_norm_inside_each_row(matrix: tuple[torch.Tensor, torch.Tensor], target: Target) -> None:
    weight, inputs = matrix
    scores = weight.double().abs() * inputs.double().square().sum(0).sqrt()
    assert torch.equal(alone(weight, inputs, "wanda", target), weight * keep_largest(scores, target))


def paper_sparsegpt(weight: torch.Tensor, inputs: torch.Tensor, target: Target, block: int = 128) -> torch.Tensor:
    """Algorithm 1 of the paper in float64: H = 2 X X^T + lambda I, masks by w^2 / [H^-1]_cc^2, updates by columns."""
    weight, hessian = weight.double().clone(), 2 / len(inputs) * inputs.double().T @ inputs.double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    inverse = torch.linalg.cholesky(torch.linalg.inv(hessian)).mT
    diagonal = inverse.diagonal()
    kept = torch.ones_like(weight, dtype=torch.bool)
    for start in range(0, weight.shape[1], block):
        stop = min(start + block, weight.shape[1])
        if not target.of:
            scores = (weight[:, start:stop] / diagonal[start:stop]) ** 2
            kept[:, start:stop] = scores > scores.flatten().sort().values[int(scores.numel() * target.share)]
        for column in range(start, stop):
            if target.of and column % target.of == 0:
                group = slice(column, column + target.of)
                kept[:, group] = keep_largest((weight[:, group] / diagonal[group]) ** 2, target)
            error = weight[:, column] * ~kept[:, column] / diagonal[column]
            weight[:, column:] -= error[:, None] * inverse[column, column:]
    return weight * kept


@pytest.mark.parametrize("target", [HALF, TWO_OF_FOUR, ONE_OF_FOUR], ids=lambda target: target.pattern)
def test_sparsegpt_is_the_papers_algorithm(target: Target) -> None:
    weight, inputs = torch.randn(16, 160, generator=seeded(4)), correlated(600, 160)  # two blocks, one of them short
    ours, expected = alone(weight, inputs, "sparsegpt", target), paper_sparsegpt(weight, inputs, target)
    agreed = ((ours == 0) == (expected == 0)).double().mean().item()
    assert agreed > 0.999  # float32 may order two nearly equal scores the other way
    rows = ((ours == 0) == (expected == 0)).all(1)
    assert rows.double().mean() > 0.8
    torch.testing.assert_close(ours[rows].double(), expected[rows], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("target", [HALF, TWO_OF_FOUR], ids=lambda target: target.pattern)
def test_each_criterion_keeps_more_of_the_output_than_the_one_before(
    matrix: tuple[torch.Tensor, torch.Tensor], target: Target
) -> None:
    weight, inputs = matrix
    losses = [(inputs @ (alone(weight, inputs, criterion, target) - weight).T).square().sum() for criterion in CRITERIA]
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", LAYOUTS)
def test_a_block_is_shown_what_it_reads_in_the_whole_model(model_type: str) -> None:
    """Each example goes through the model alone, cut where its text ends; the blocks are shown the same, in batches."""
    model = tiny_model(model_type)
    ids = example_ids(model)
    every = {linear: name for block in blocks(model) for name, linear in linears(block).items()}
    seen, shown = ({name: [] for name in every.values()} for _ in range(2))
    hooks = [
        linear.register_forward_pre_hook(lambda linear, inputs: seen[every[linear]].append(inputs[0].flatten(0, 1)))
        for linear in every
    ]
    with torch.no_grad():
        for row in ids:
            model(**alone_inputs(model, row))
    for hook in hooks:
        hook.remove()
    for visit in visits(model, unpadded_inputs(model.config, ids, batch=4)):
        visit.watch(lambda linear, inputs: shown[every[linear]].append(inputs))
    for name in every.values():
        assert len(shown[name]) < len(seen[name]) == len(ids)
        found, expected = (torch.cat(parts) for parts in (shown[name], seen[name]))
        assert found.shape == expected.shape
        torch.testing.assert_close(found.T @ found, expected.T @ expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "criterion"), [("marian", "wanda"), ("t5", "sparsegpt")])
def test_padding_is_no_text(model_type: str, criterion: str) -> None:
    padded, plain = tiny_model(model_type), tiny_model(model_type)
    ids = example_ids(plain)
    source, target = ids.chunk(2, dim=1)
    longer = torch.cat([torch.nn.functional.pad(part, (0, 7)) for part in (source, target)], dim=1)
    sparsify(plain, criterion, HALF, ids)
    sparsify(padded, criterion, HALF, longer)
    for (name, weight), other in zip(plain.named_parameters(), padded.parameters(), strict=True):
        assert ((weight == 0) == (other == 0)).float().mean() > 0.999, name
        torch.testing.assert_close(weight, other, rtol=1e-2, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "criterion"),
    [*((name, "wanda") for name in FAMILIES), ("llama", "magnitude"), ("mbart", "magnitude"), ("bert", "sparsegpt")],
)
def test_only_the_matrices_inside_the_blocks_get_zeros(model_type: str, criterion: str) -> None:
    model, before = tiny_model(model_type), tiny_model(model_type)
    found = sparsify(model, criterion, TWO_OF_FOUR, example_ids(model))
    assert found.pattern == "2:4"
    assert set(found.shares) == {f"{name}.weight" for block in blocks(model) for name in linears(block)}
    assert set(found.shares.values()) == {0.5}
    for (name, weight), old in zip(model.named_parameters(), before.parameters(), strict=True):
        if name in found.shares:
            assert ((weight.view(len(weight), -1, 4) != 0).sum(2) == 2).all(), name
        else:
            assert torch.equal(weight, old), name


@pytest.mark.slow
@pytest.mark.parametrize("target", [HALF, TWO_OF_FOUR], ids=lambda target: target.pattern)
@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_a_llama_is_pruned_as_by_llm_compressor(criterion: str, target: Target, tmp_path: Path) -> None:
    """Its sequential pipeline traces the model and prunes layer by layer: another way to the same weights."""
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    from featherweight.quantization import oneshot

    ours, theirs = (opening.load_model(path) for path in 2 * [family_checkpoint("llama", tmp_path)])
    ids = example_ids(ours, 16)
    kind = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[criterion]
    options = {"sparsity": 0.5, "mask_structure": "2:4" if target.of else "0:0", "targets": ["Linear"], "ignore": ["re:.*lm_head"]}
    oneshot.run(theirs, lambda: [kind(**options)], ids)
    sparsify(ours, criterion, target, ids)
    for (name, weight), other in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(weight, other[1], rtol=1e-3, atol=1e-3, msg=name)


def test_activations_that_are_no_numbers_are_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(StageError, match=r"model\.layers\.0\.mlp\.down_proj reads .* not finite"):
        sparsify(model, "wanda", HALF, example_ids(model))
