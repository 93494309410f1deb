"""The quantize stage: every method puts every weight on its grid, and writes exactly that."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from featherweight import grid
from featherweight.checkpoint import opening, streamed
from featherweight.checkpoint.tokenizer import load_tokenizer
from featherweight.errors import CheckpointError, DataError, RecipeError, StageError
from featherweight.grid import GRIDS, grid_named
from featherweight.model.quantized_weights import QuantizedWeights
from featherweight.progress import Progress
from featherweight.quantization import gptq, qat
from featherweight.quantization.catalog import QUANTIZERS
from featherweight.quantization.interface import QuantizationInput
from featherweight.quantization.self_generated_text import draw_passages, generate_blocks
from featherweight.quantization.smoothing import smoothed
from featherweight.quantization.spec import QuantizeSpec
from featherweight.store import mapped
from featherweight.text.documents import Document, write_documents
from featherweight.text.tokens import token_blocks
from tasks.quantize import quantize
from tests.support.gptq_formula import reference_gptq
from tests.support.paths import SHARED

EMBEDDING = "model.embed_tokens.weight"
TIED = [name for name in QUANTIZERS if name != "spinquant"]
"""Methods that take a tied head."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of a small vocabulary in no order."""
    words = ["grid", "scale", "integer", "weight", "row", "group", "rounds", "holds", "the", "a", "of", "to"]
    draws = torch.randint(len(words), (60, 40), generator=torch.Generator().manual_seed(0)).tolist()
    folder = tmp_path_factory.mktemp("text")
    write_documents(folder, [Document(str(i), " ".join(words[word] for word in draw)) for i, draw in enumerate(draws)])
    return folder


def spec(**options: object) -> QuantizeSpec:
    short = {"qat": {"steps": 3, "batch": 4}, "autoround": {"steps": 12}}.get(str(options.get("method")), {})
    return QuantizeSpec.model_validate({"samples": 12, "sequence": 32, **short, **options})


def run(checkpoint: Path, text: Path, out: Path, seed: int = 0, **options: object) -> dict[str, float]:
    out.mkdir(parents=True)
    return dict(quantize(spec(**options), checkpoint=checkpoint, text=text, calibration=text, out=out, seed=seed))


def assert_on_grid(folder: Path, grid: str, head: str | None) -> None:
    """The float weights are exactly what the integers and scales stand for, and all of them are covered."""
    quantized = QuantizedWeights.read(folder)
    assert quantized is not None
    saved = load_file(folder / "model.safetensors")
    assert {name for name, tensor in saved.items() if tensor.ndim == 2 and ".layers." in name} <= set(quantized.grids)
    assert (quantized.grid, quantized.head) == (grid, head)
    assert (EMBEDDING in quantized.grids) == (head is not None)
    for name, expected in quantized.grids.items():
        q, scales = quantized.q[name], quantized.scales[name]
        assert (q.dtype, scales.dtype, saved[name].dtype) == (expected.dtype, torch.float32, torch.float32)
        assert scales.shape == (len(q), expected.groups(q.shape[1]))
        assert q.float().min() >= expected.qmin
        assert q.float().max() <= expected.qmax
        assert torch.equal(quantized.dequantize(name), saved[name])
        assert torch.equal(expected.quantize(saved[name], scales)[0].float(), q.float())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "grid"),
    [
        (method, name)
        for method in ("rtn", "gptq", "awq", "autoround", "qat")
        for name in GRIDS
        if name != "fp8" or method not in ("autoround", "qat")
    ],
)
def test_every_weight_is_its_integer_times_its_scale(
    method: str, grid: str, tiny_checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    metrics = run(tiny_checkpoint, text, tmp_path / "out", method=method, grid=grid, head=grid)
    assert_on_grid(tmp_path / "out", grid, grid)
    assert metrics["bits_per_weight"] > grid_named(grid).bits
    few = grid_named(grid).bits == 2
    assert 0 < metrics["weight_rms_error"] < (0.8 if few else 0.2)
    assert metrics["loss_after"] == pytest.approx(metrics["loss_before"], rel=0.3 if few else 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("method", TIED)
def test_the_folder_loads_plainly_and_holds_nothing_else(
    method: str, tiny_checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    run(tiny_checkpoint, text, tmp_path / "out", method=method, grid="int4-g32", head="int8")
    assert_on_grid(tmp_path / "out", "int4-g32", "int8")
    model = opening.load_model(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in saved
    assert all(torch.equal(model.state_dict()[name].cpu(), tensor) for name, tensor in saved.items())
    source = {path.name for path in tiny_checkpoint.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == source | {"quantized.safetensors", "quantization.json"}
    assert list(cwd.iterdir()) == []
    assert "WARNING" not in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("method", TIED)
def test_the_same_seed_gives_the_same_bytes(method: str, tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    options = {"generated_tokens": 64} if method == "qat" else {}
    for name in ("a", "b"):
        run(tiny_checkpoint, text, tmp_path / name, method=method, grid="int4-g32", head="int4-g32", **options)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"grid": "int8"},
        {"grid": "int4-g32", "method": "gptq"},
        {"grid": "int8", "method": "smoothquant"},
        {"grid": "int4-g32", "method": "gptq", "smooth": "awq"},
        {"grid": "int4-g32", "method": "autoround"},
    ],
)
def test_a_large_checkpoint_stays_in_its_files_to_the_same_bytes(
    options: dict[str, Any], tiny_checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tiny_checkpoint, text, tmp_path / "whole", **options)
    monkeypatch.setattr(streamed, "LARGE", 1)
    monkeypatch.setattr(grid, "CHUNK", 500)
    monkeypatch.setattr(mapped, "SMALL", 1)
    assert run(tiny_checkpoint, text, tmp_path / "streamed", **options) == pytest.approx(whole, rel=1e-6)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "streamed" / path.name).read_bytes(), path.name


def test_a_float_head_stays_as_it_was(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    run(tiny_checkpoint, text, tmp_path / "out", method="gptq", grid="int4", head=None)
    assert_on_grid(tmp_path / "out", "int4", None)
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_checkpoint, tmp_path / "out"))
    assert torch.equal(before[EMBEDDING], after[EMBEDDING])


@pytest.mark.slow
@pytest.mark.parametrize("method", TIED)
def test_an_untied_sharded_checkpoint_of_odd_widths(method: str, tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """Rows of 88 weights end in a short group; bfloat16 comes out as float32; the head has integers of its own."""
    from transformers import LlamaConfig, LlamaForCausalLM

    source = tmp_path / "source"
    shutil.copytree(tiny_checkpoint, source)
    (source / "model.safetensors").unlink()
    config = LlamaConfig.from_pretrained(tiny_checkpoint, intermediate_size=88, tie_word_embeddings=False)
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(source, max_shard_size="60KB")
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    assert len(shards) > 1
    run(source, text, tmp_path / "out", method=method, grid="int4-g32", head="int8-g32")
    assert sorted(path.name for path in (tmp_path / "out").glob("model*.safetensors")) == shards
    quantized = QuantizedWeights.read(tmp_path / "out")
    assert quantized is not None
    assert quantized.grids["lm_head.weight"].name == "int8-g32"
    assert quantized.scales["model.layers.0.mlp.down_proj.weight"].shape == (64, 3)
    state = opening.load_model(tmp_path / "out").state_dict()
    assert all(torch.equal(state[name].cpu(), quantized.dequantize(name)) for name in quantized.grids)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


@pytest.fixture(scope="module")
def outliers(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a few channels of large activations, as language models have them."""
    folder = tmp_path_factory.mktemp("outliers") / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    for layer in range(2):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{norm}.weight"][[3, 17, 40]] *= 20
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def input_of(checkpoint: Path, text: Path, **options: object) -> QuantizationInput:
    blocks = token_blocks(text, load_tokenizer(checkpoint), 32, limit=12, seed=0)
    return QuantizationInput(spec(**options), checkpoint, opening.load_model(checkpoint), blocks, text, 0, Progress())


def logprobs(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids).logits.log_softmax(-1)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"method": "smoothquant"}, {"method": "awq"}, {"method": "gptq", "smooth": "awq"}])
@pytest.mark.parametrize("grid", ["int8", "int4-g32"])
def test_smoothing_moves_ranges_and_keeps_the_function(options: dict, grid: str, outliers: Path, text: Path) -> None:
    given = input_of(outliers, text, grid=grid, **options)
    ids = token_blocks(text, load_tokenizer(outliers), 32, limit=4, seed=1)
    before = logprobs(opening.load_model(outliers), ids)
    found = smoothed(given)
    assert torch.allclose(logprobs(found.model, ids), before, atol=1e-4)
    assert {"model.layers.0.input_layernorm.weight", "model.layers.1.mlp.gate_proj.weight"} <= set(found.smoothed)
    assert "model.embed_tokens.weight" not in found.smoothed
    tensors = dict(found.tensors())
    assert set(tensors) == {name for name, _ in given.tensors()}
    assert all(torch.equal(found.model.state_dict()[name], tensor) for name, tensor in tensors.items())
    assert not any(hasattr(module, "quantization_scheme") for module in found.model.modules())


def test_smoothquant_is_the_papers_formula(outliers: Path, text: Path) -> None:
    """s_j = max|X_j|^a / max|W_j|^(1-a) at a = 0.5, over all matrices that read X."""
    given = input_of(outliers, text, method="smoothquant")
    model, seen = opening.load_model(outliers), {}
    readers = {"input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]}
    readers["post_attention_layernorm"] = ["mlp.gate_proj", "mlp.up_proj"]
    for norm in readers:
        layer = model.get_submodule(f"model.layers.1.{norm}")
        layer.register_forward_hook(lambda _, args, out, norm=norm: seen.__setitem__(norm, out.flatten(0, 1).double()))
    with torch.inference_mode():
        model(input_ids=given.calibration)
    found, state = smoothed(given).smoothed, model.state_dict()
    for norm, names in readers.items():
        weights = torch.cat([state[f"model.layers.1.{name}.weight"] for name in names]).double()
        scales = (seen[norm].abs().amax(0) / weights.abs().amax(0)).sqrt()
        name = f"model.layers.1.{norm}.weight"
        assert torch.allclose(state[name].double() / found[name].double(), scales, rtol=1e-4)
        for name in (f"model.layers.1.{name}.weight" for name in names):
            assert torch.allclose(found[name].double(), state[name].double() * scales, rtol=1e-4)


@pytest.mark.slow
def test_awq_loses_less_than_rounding_where_channels_stand_out(outliers: Path, text: Path, tmp_path: Path) -> None:
    ids = token_blocks(text, load_tokenizer(outliers), 32, limit=16, seed=1)
    target = logprobs(opening.load_model(outliers), ids)
    for method in ("rtn", "awq"):
        run(outliers, text, tmp_path / method, method=method, grid="int4-g32", head=None)
    rtn, awq = (
        torch.nn.functional.kl_div(logprobs(opening.load_model(tmp_path / method), ids), target, reduction="sum", log_target=True)
        for method in ("rtn", "awq")
    )
    assert awq < 0.8 * rtn


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "qat"])
def test_every_method_rounds_what_was_smoothed(method: str, outliers: Path, text: Path, tmp_path: Path) -> None:
    still = {"learning_rate": 1e-9} if method == "qat" else {}
    metrics = run(outliers, text, tmp_path / "out", method=method, smooth="smoothquant", grid="int8", head=None, **still)
    assert_on_grid(tmp_path / "out", "int8", None)
    before, after = (load_file(folder / "model.safetensors") for folder in (outliers, tmp_path / "out"))
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.allclose(before[norm], after[norm], rtol=0.1)
    assert metrics["loss_after"] == pytest.approx(metrics["loss_before"], rel=0.01)
    ids = token_blocks(text, load_tokenizer(outliers), 32, limit=4, seed=1)
    a, b = (logprobs(opening.load_model(folder), ids) for folder in (outliers, tmp_path / "out"))
    assert (a - b).abs().mean() < 0.05


def test_one_smoothing_at_a_time() -> None:
    with pytest.raises(ValueError, match="method awq smooths already"):
        spec(method="awq", smooth="smoothquant")


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["int4-g32", "int8", "int8-reduced"])
def test_gptq_is_the_formula(grid: str, tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """On the first layer, whose inputs no earlier rounding has touched."""
    name = "model.layers.0.self_attn.q_proj"
    run(tiny_checkpoint, text, tmp_path / "out", method="gptq", grid=grid, head=None)
    model = opening.load_model(tiny_checkpoint)
    seen: list[torch.Tensor] = []
    layer = model.get_submodule(name)
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.inference_mode():
        model(input_ids=token_blocks(text, load_tokenizer(tiny_checkpoint), 32, limit=12, seed=0))
    inputs, weight = torch.cat(seen), layer.weight.detach()
    expected = reference_gptq(weight, inputs, grid)
    found = load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"]
    nearest = grid_named(grid).fake_quantize(weight)
    # In float32 a weight close to the middle of two steps can fall to either side, and pull its row's later columns along.
    assert torch.isclose(found.double(), expected, atol=1e-5).double().mean() > 0.97

    def loss(quantized: torch.Tensor) -> float:
        return (inputs.double() @ (quantized - weight).double().T).square().mean().item()

    assert loss(found) == pytest.approx(loss(expected), rel=0.05)
    assert loss(found) < 0.8 * loss(nearest)


def test_gptq_describes_our_grids_in_bits() -> None:
    bits = {name: gptq.scheme(grid, ["x"], "absmax")["weights"]["num_bits"] for name, grid in GRIDS.items()}
    assert bits == {name: 7 if name == "int8-reduced" else grid.bits for name, grid in GRIDS.items()}


@pytest.mark.parametrize("grid", [name for name, grid in GRIDS.items() if grid.kind == "int"])
def test_fake_quantization_rounds_forward_and_passes_gradients_straight_through(grid: str) -> None:
    torch.manual_seed(0)
    rule = grid_named(grid)
    weight = torch.randn(6, 70, requires_grad=True)
    scales = rule.scales(weight.detach()) * 0.6  # small enough that some weights are cut
    value, upstream = qat.fake_quantize(weight, scales, rule), torch.randn(6, 70)
    assert torch.equal(value, rule.dequantize(*rule.quantize(weight.detach(), scales)))
    (found,) = torch.autograd.grad(value, weight, upstream)
    steps = weight.detach() / scales.repeat_interleave(rule.group_size or 70, dim=1)[:, :70]
    cut = (steps < rule.qmin - 0.5) | (steps > rule.qmax + 0.5)
    assert 0 < cut.sum() < 200
    assert torch.equal(found, upstream * ~cut)


@pytest.mark.parametrize("grid", ["int2-g64", "int4", "int8-g32"])
def test_a_scale_has_the_gradient_of_lsq(grid: str) -> None:
    """Esser et al. 2020, eq. 3 and the gradient scale of 2.2, weight by weight; a group that is short counts as a whole one."""
    torch.manual_seed(0)
    rule, weight = grid_named(grid), torch.randn(3, 80)
    scales = rule._held(rule.scales(weight) * 0.6).requires_grad_()
    upstream = torch.randn(3, 80)
    (found,) = torch.autograd.grad(qat.fake_quantize(weight, scales, rule), scales, upstream)
    size = rule.group_size or 80
    wanted = torch.zeros(scales.shape, dtype=torch.float64)
    cut = 0
    for (row, column), value in np.ndenumerate(weight.double().numpy()):
        step = value / scales[row, column // size].item()
        end = rule.qmin if step <= rule.qmin else rule.qmax if step >= rule.qmax else None
        share = round(step) - step if end is None else end
        cut += end is not None
        wanted[row, column // size] += share * upstream[row, column].item() / (size * rule.qmax) ** 0.5
    assert 0 < cut < 200
    assert torch.allclose(found.double(), wanted, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_scale_is_that_of_finite_differences_where_integers_stay() -> None:
    """What is not passed straight through: of weights beyond the ends, whose integers no small change of the scale moves."""
    rule = grid_named("int2-g64")
    weight = torch.tensor([[-5.0, 4.0, 3.5, -7.0]])

    def loss(scales: torch.Tensor) -> float:
        return rule.dequantize(*rule.quantize(weight, scales)).double().square().sum().item()

    scales, by = torch.tensor([[0.8]], requires_grad=True), 2.0**-8
    (found,) = torch.autograd.grad(qat.fake_quantize(weight, scales, rule).square().sum(), scales)
    wanted = (loss(scales.detach() + by) - loss(scales.detach() - by)) / (2 * by)
    assert found.item() * 64**0.5 == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(("asked", "learned"), [("auto", {"up"}), ("learned", {"up", "head"}), ("fixed", set())])
def test_scales_are_learned_where_the_spec_says_or_bits_are_few(asked: str, learned: set[str]) -> None:
    model = torch.nn.ModuleDict({name: torch.nn.Linear(64, 4, bias=False) for name in ("up", "head")})
    model.config = None
    grids = {"up.weight": grid_named("int2-g64"), "head.weight": grid_named("int8")}
    made = {name: grid.quantize(model.get_parameter(name).detach()) for name, grid in grids.items()}
    q, scales = ({name: one[place] for name, one in made.items()} for place in (0, 1))
    spec = QuantizeSpec.of(method="qat", scales=asked)
    trained = qat.fake_quantized(model, QuantizedWeights(grids, q, scales, "rtn"), spec.learns)
    for scale in trained.learned:
        scale.data.mul_(1.5)
    found = trained.quantized()
    for name in ("up", "head"):
        factor = 1.5 if name in learned else 1.0
        assert torch.equal(found.scales[f"{name}.weight"], made[f"{name}.weight"][1] * factor)
        expected = grids[f"{name}.weight"].quantize(model.get_parameter(f"{name}.weight").detach(), found.scales[f"{name}.weight"])[
            0
        ]
        assert torch.equal(found.q[f"{name}.weight"], expected)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["rtn", "gptq"])
def test_training_begins_at_the_rounding_it_is_given(start: str, tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    options = {"grid": "int4-g32", "head": "int4"}
    run(tiny_checkpoint, text, tmp_path / start, method=start, **options)
    run(tiny_checkpoint, text, tmp_path / "qat", method="qat", learning_rate=1e-12, start=start, **options)
    given, found = (load_file(tmp_path / method / "quantized.safetensors") for method in (start, "qat"))
    assert all(torch.equal(given[name], found[name]) for name in given)


def test_fake_quantization_agrees_with_torchao() -> None:
    from torchao.quantization.qat import IntxFakeQuantizeConfig
    from torchao.quantization.qat.fake_quantizer import IntxFakeQuantizer

    torch.manual_seed(0)
    weight = torch.randn(8, 64, requires_grad=True)
    theirs = IntxFakeQuantizer(IntxFakeQuantizeConfig(torch.int4, group_size=32, is_symmetric=True))
    value = theirs(weight)
    scales = theirs.scale.detach().float().view(8, 2)
    ours = qat.fake_quantize(weight, scales, grid_named("int4-g32"))
    # Their largest weight of a group lies on the middle of two steps (absmax / 7.5): either side is right.
    clear = (weight.detach() / scales.repeat_interleave(32, dim=1)).abs() < 7.49
    assert torch.allclose(ours[clear], value[clear], atol=1e-6)
    upstream = torch.randn(8, 64) * clear
    found, expected = (torch.autograd.grad(fake, weight, upstream)[0] for fake in (ours, value))
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.slow
def test_training_recovers_what_rounding_lost(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """Four bits per row hurt a random model; a few steps towards its own logits bring most of them back."""
    options = {"grid": "int4", "head": "int4"}
    trained = run(tiny_checkpoint, text, tmp_path / "qat", method="qat", steps=60, learning_rate=1e-3, batch=8, **options)
    assert trained["loss_last"] < 0.6 * trained["loss_first"]
    ids = token_blocks(text, load_tokenizer(tiny_checkpoint), 32, limit=16, seed=1)
    run(tiny_checkpoint, text, tmp_path / "rtn", method="rtn", **options)
    folders = (tiny_checkpoint, tmp_path / "rtn", tmp_path / "qat")
    with torch.inference_mode():
        target, rtn, learned = (opening.load_model(folder)(input_ids=ids).logits.log_softmax(-1) for folder in folders)

    def kl(found: torch.Tensor) -> float:
        return torch.nn.functional.kl_div(found, target, reduction="sum", log_target=True).item()

    assert kl(learned) < 0.6 * kl(rtn)


@pytest.mark.slow
def test_the_text_itself_can_be_the_target(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    metrics = run(tiny_checkpoint, text, tmp_path / "out", method="qat", grid="int8", distill=False, steps=30, learning_rate=3e-3)
    assert metrics["loss_after"] < metrics["loss_before"] - 0.5


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"steps": 40, "learning_rate": 1e6, "distill": False}, {"steps": 4, "learning_rate": 10}])
def test_a_run_away_training_is_an_error(options: dict[str, Any], tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="training diverged at step"):
        run(tiny_checkpoint, text, tmp_path / "out", method="qat", **options)


@pytest.mark.slow
def test_the_checkpoint_writes_its_own_text(tiny_checkpoint: Path) -> None:
    model = opening.load_model(tiny_checkpoint)
    bos = torch.full((6000, 1), model.config.bos_token_id)
    blocks = generate_blocks(model, bos[:200], 12, seed=3)
    assert blocks.shape == (200, 12)
    assert blocks.dtype == torch.long
    assert (blocks[:, 0] == model.config.bos_token_id).all()
    assert torch.equal(blocks, generate_blocks(model, bos[:200], 12, seed=3))
    assert not torch.equal(blocks, generate_blocks(model, bos[:200], 12, seed=4))
    # Sampled, not greedy, and from the model's own distribution: the second tokens follow its probabilities after BOS.
    many = generate_blocks(model, bos, 2, seed=0)[:, 1]
    with torch.inference_mode():
        shares = model(input_ids=blocks[:1, :1]).logits[0, 0].softmax(-1)
    counts = torch.bincount(many, minlength=len(shares)) / 6000
    kept = [i for i in range(len(shares)) if i not in (model.config.bos_token_id, model.config.eos_token_id)]
    assert (counts - shares)[kept].abs().max() < 5 * (shares.max() / 6000).sqrt()


def test_it_goes_on_from_passages_of_the_text(tiny_checkpoint: Path, text: Path) -> None:
    model = opening.load_model(tiny_checkpoint)
    read = token_blocks(text, load_tokenizer(tiny_checkpoint), 32, limit=20, seed=0)
    passages = draw_passages([model.config.bos_token_id], read, 50, 8, seed=1)
    stream = read.flatten().tolist()
    told = {tuple(stream[place : place + 7]) for place in range(len(stream))}
    assert (passages[:, 0] == model.config.bos_token_id).all()
    assert all(tuple(row) in told for row in passages[:, 1:].tolist())
    assert len({tuple(row) for row in passages.tolist()}) > 30
    assert torch.equal(draw_passages([], read, 50, 7, seed=1), passages[:, 1:])
    blocks = generate_blocks(model, passages, 20, seed=0)
    assert torch.equal(blocks[:, :8], passages)
    # What follows is what the model says after the passage, with the cache as without.
    with torch.inference_mode():
        likely = model(input_ids=blocks[:, :-1]).logits[:, 7:].log_softmax(-1)
        chosen = likely.gather(-1, blocks[:, 8:, None])[..., 0]
    assert chosen.mean() > likely.mean() + 0.5


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "qat"])
def test_progress_counts_to_the_end(method: str, tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    class Counts(Progress):
        def __init__(self) -> None:
            self.seen: list[tuple[int, int]] = []

        def step(self, done: int, total: int, **values: float) -> None:
            self.seen.append((done, total))

    progress = Counts()
    quantize(spec(method=method), checkpoint=tiny_checkpoint, text=text, calibration=text, out=tmp_path, progress=progress)
    done = [count for count, _ in progress.seen]
    assert done == sorted(set(done))
    assert progress.seen[-1] == ((14, 14) if method == "gptq" else (3, 3))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sequence": 512}, RecipeError, "quantize.sequence 512 is longer than the model's context of 256"),
    ],
)
def test_bad_recipes_are_refused(
    options: dict, error: type[Exception], message: str, tiny_checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        run(tiny_checkpoint, text, tmp_path / "out", **options)
    assert list((tmp_path / "out").iterdir()) == []


def test_too_little_text_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    write_documents(tmp_path / "text", [Document("only", "short")])
    with pytest.raises(DataError, match="fewer than one block of 32"):
        run(tiny_checkpoint, tmp_path / "text", tmp_path / "out", method="gptq")


def test_weights_that_are_not_numbers_are_refused(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "source")
    weights = load_file(tmp_path / "source" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        run(tmp_path / "source", text, tmp_path / "out", method="rtn")


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_checkpoint_that_computes_no_numbers_is_refused(method: str, tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """Before any calibration, with the place: the weight, or where all weights are finite the layer."""
    name = "model.layers.1.mlp.up_proj.weight"
    for value, error, message in (
        (torch.nan, CheckpointError, "layers.1.mlp.up_proj.weight holds NaN"),
        (3e38, StageError, "calibration text is nan: model.layers.1.mlp.up_proj gives NaN or infinite activations"),
    ):
        source = tmp_path / error.__name__
        shutil.copytree(tiny_checkpoint, source)
        weights = load_file(source / "model.safetensors")
        weights[name][:] = value
        save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(error, match=message):
            run(source, text, source / "out", method=method)
        assert list((source / "out").iterdir()) == []


def test_quantized_weights_survive_the_disk(tmp_path: Path) -> None:
    weight = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    name = "model.layers.0.mlp.up_proj.weight"
    grid = grid_named("int4-g32")
    q, scales = grid.quantize(weight)
    QuantizedWeights({name: grid}, {name: q}, {name: scales}, "rtn").write(tmp_path)
    found = QuantizedWeights.read(tmp_path)
    assert found is not None
    assert (found.grid, found.head, found.method) == ("int4-g32", None, "rtn")
    told = json.loads((tmp_path / "quantization.json").read_text())
    assert told.pop("heads") == []
    told["grids"] = {"model.embed_tokens.weight": "int4-g32"}
    tensors = {f"model.embed_tokens.weight.{part}": value for part, value in (("q", q), ("scales", scales))}
    (tmp_path / "before").mkdir()
    (tmp_path / "before" / "quantization.json").write_text(json.dumps(told))
    save_file(tensors, tmp_path / "before" / "quantized.safetensors")
    written_before = QuantizedWeights.read(tmp_path / "before")
    assert written_before is not None
    assert (written_before.grid, written_before.head) == (None, "int4-g32")
    assert torch.equal(found.dequantize(name), grid.fake_quantize(weight))
    (tmp_path / "quantized.safetensors").write_bytes(b"damage")
    with pytest.raises(CheckpointError, match="damaged quantized weights"):
        QuantizedWeights.read(tmp_path)
    assert QuantizedWeights.read(tmp_path / "elsewhere") is None


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "models" / "stories260K").exists(), reason="no real model under ../shared")
def test_gptq_beats_rounding_on_a_real_model(tmp_path: Path) -> None:
    stories = (SHARED / "data" / "tinystories-excerpt" / "tinystories.txt").read_text().split("\n\nOnce upon a time")
    write_documents(tmp_path / "text", [Document(str(i), "Once upon a time" + story) for i, story in enumerate(stories[:80])])
    options = {"grid": "int4", "head": None, "samples": 64, "sequence": 128}
    losses = {
        method: run(SHARED / "models" / "stories260K", tmp_path / "text", tmp_path / method, method=method, **options)
        for method in ("rtn", "gptq")
    }
    lost = {method: metrics["loss_after"] - metrics["loss_before"] for method, metrics in losses.items()}
    assert 0 < lost["gptq"] < 0.85 * lost["rtn"]


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_weights(
    tiny_checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featherweight.training import loop

    class Killed(Progress):
        def __init__(self, at: int) -> None:
            self.at, self.notes = at, list[str]()

        def step(self, done: int, total: int, **values: float) -> None:
            if (done, total) == (self.at, 6):
                raise KeyboardInterrupt

        def note(self, note: str) -> None:
            self.notes.append(note)

    monkeypatch.setattr(loop.Saver, "due", lambda saver: True)
    options = spec(method="qat", steps=6, learning_rate=1e-3)
    inputs = {"checkpoint": tiny_checkpoint, "text": text, "calibration": text}
    for name in ("whole", "stopped", "resumed", "scratch"):
        (tmp_path / name).mkdir()
    quantize(options, **inputs, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        quantize(options, **inputs, out=tmp_path / "stopped", scratch=tmp_path / "scratch", progress=Killed(4))
    progress = Killed(-1)
    quantize(options, **inputs, out=tmp_path / "resumed", scratch=tmp_path / "scratch", progress=progress)
    assert "resuming at step 3" in progress.notes
    for name in ("model.safetensors", "quantized.safetensors"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
