"""The judgement: honest methods pass, and every method that is broken on purpose fails its stage with both numbers."""

from __future__ import annotations

import dataclasses
import random
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight.checkpoint import opening
from featherweight.errors import StageError
from featherweight.progress import Progress
from featherweight.quantization import gptq, interface, oneshot, qat, rtn
from featherweight.quantization.awq import AWQ
from featherweight.quantization.catalog import QUANTIZERS
from featherweight.quantization.judgement import FEWEST, LARGEST, SIGMAS, Judgement, distance, require_alike, round_in_place
from featherweight.quantization.spec import QuantizeSpec
from featherweight.text.documents import Document, write_documents
from featherweight.text.model_inputs import example_blocks
from featherweight.training import losses
from featherweight.training.losses import block_losses, mean_loss, token_loss
from tasks.quantize import COMPARED, quantize
from tests.support.heads import fit, head_checkpoint
from tests.support.outside_quantizer import ClipSpec

WORDS = ["grid", "scale", "integer", "weight", "row", "group", "rounds", "holds", "the", "a", "of", "to"]
SIZES = {"samples": COMPARED, "sequence": 32}
HONEST: list[dict[str, Any]] = [
    {"method": "gptq", "scale": "mse"},
    {"method": "smoothquant"},
    {"method": "gptq", "smooth": "awq"},
    {"method": "autoround", "steps": 20},
    {"method": "qat", "steps": 2, "batch": 4},
]
TOLD = re.compile(r"the loss on the calibration text is (\S+) nats where rounding to nearest has (\S+) ")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents whose every word is followed by one of two."""
    folder, draw = tmp_path_factory.mktemp("text"), random.Random(0)
    documents = []
    for number in range(40):
        place = draw.randrange(len(WORDS))
        words = [WORDS[place := (place * 5 + draw.choice((1, 2))) % len(WORDS)] for _ in range(60)]
        documents.append(Document(str(number), " ".join(words)))
    write_documents(folder, documents)
    return folder


@pytest.fixture(scope="module")
def trained(tiny_checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint once it has learned that text: what is lost by breaking it shows."""
    from featherweight.text.documents import read_documents

    folder = tmp_path_factory.mktemp("trained") / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    model = opening.load_model(folder)
    fit(folder, model, list(read_documents(text)), steps=80)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def run(trained: Path, text: Path, tmp_path: Path) -> Callable[..., dict[str, float]]:
    def stage(grid: str = "int4-g32", **options: Any) -> dict[str, float]:
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        out.mkdir()
        spec = QuantizeSpec.of(**SIZES, **{"grid": grid, "head": "int8", **options})
        return dict(quantize(spec, checkpoint=trained, text=text, calibration=text, out=out))

    return stage


@pytest.mark.slow
def test_honest_methods_pass_and_are_compared_with_rounding_itself(run: Callable[..., dict[str, float]]) -> None:
    plain = {scale: run(scale=scale) for scale in ("absmax", "mse")}
    assert "rtn_loss" not in plain["absmax"]
    for options in HONEST:
        metrics = run(**options)
        assert metrics["rtn_loss"] == pytest.approx(plain[options.get("scale", "absmax")]["loss_after"], rel=1e-6), options
        assert metrics["loss_after"] < 1.1 * metrics["rtn_loss"], options


def positive(scales: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Scales as llm-compressor's Triton kernel takes them."""
    return lambda *args: scales(*args).clamp_min(1e-10)


def grown(calibrate: Callable[..., Any]) -> Callable[..., Any]:
    """A calibration that leaves a matrix four times as large as it should."""

    def broken(model: Any, *args: Any) -> Any:
        found = calibrate(model, *args)
        model.model.layers[1].mlp.up_proj.weight.data *= 4
        return found

    return broken


def shifted(choose: Callable[..., Any]) -> Callable[..., Any]:
    """Integers one column to the side."""

    def broken(given: Any, tensors: Any) -> Any:
        found = choose(given, tensors)
        return dataclasses.replace(found, q={name: q.roll(1, 1) for name, q in found.q.items()})

    return broken


BREAKS: list[tuple[dict[str, Any], Any, str, Callable[..., Any]]] = [
    ({"method": "gptq"}, gptq, "start_scales", positive),
    ({"method": "gptq", "grid": "int8-full"}, gptq, "start_scales", positive),
    ({"method": "qat", "steps": 2, "batch": 4}, gptq, "start_scales", positive),
    ({"method": "qat", "steps": 2, "batch": 4, "start": "rtn"}, qat, "into_cells", lambda _: lambda weight, *_: weight.roll(1, 1)),
    ({"method": "awq"}, oneshot, "run", grown),
    ({"method": "smoothquant", "grid": "int8"}, oneshot, "run", grown),
    ({"method": "gptq", "smooth": "awq"}, gptq, "start_scales", positive),
    ({"method": "rtn", "smooth": "smoothquant"}, rtn, "round_to_nearest", shifted),
]


@pytest.mark.slow
@pytest.mark.parametrize(("options", "module", "name", "broken"), BREAKS)
def test_a_method_that_computes_something_else_fails_with_both_numbers(
    options: dict[str, Any], module: Any, name: str, broken: Any, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, broken(getattr(module, name)))
    with pytest.raises(StageError, match=f"^{options['method']}.*{TOLD.pattern}") as caught:
        run(**options)
    found = TOLD.search(str(caught.value))
    assert found and float(found[1]) > 1.05 * float(found[2])


def out_of_place(choose: Callable[..., Any]) -> Callable[..., Any]:
    """A choice with the rows and columns of every matrix in the blocks out of place."""

    def broken(given: Any) -> Any:
        found = choose(given)
        q = {name: q if name in found.quantized.heads else q.roll((1, 1), (0, 1)) for name, q in found.quantized.q.items()}
        return dataclasses.replace(found, quantized=dataclasses.replace(found.quantized, q=q))

    return broken


@pytest.mark.slow
@pytest.mark.parametrize("task", ["text-generation", "feature-extraction"])
def test_a_text_that_tells_nothing_hides_no_damage(
    task: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights without training predict no text; an embedding that is alone in its batch is the nearest of all, whatever it is."""
    checkpoint = tiny_checkpoint if task == "text-generation" else head_checkpoint("bert", task, tmp_path / "bert")
    write_documents(tmp_path / "text", [Document("0", "the fox saw a bear and the wolf " * 4)])
    folders = {"checkpoint": checkpoint, "text": tmp_path / "text", "calibration": tmp_path / "text", "out": tmp_path / "out"}
    spec = QuantizeSpec.of(method="awq", grid="int8", head="int8", **SIZES)
    folders["out"].mkdir()
    metrics = quantize(spec, **folders)
    assert metrics["loss_after"] <= metrics["rtn_loss"] + 0.1
    monkeypatch.setitem(QUANTIZERS.references, "awq", f"{__name__}:BROKEN")
    monkeypatch.setattr(sys.modules[__name__], "BROKEN", dataclasses.replace(AWQ, choose=out_of_place(AWQ.choose)), raising=False)
    with pytest.raises(StageError, match=r"awq on int8: its answers on the calibration text are \S+ from the checkpoint's"):
        quantize(spec, **folders)


def test_what_is_learned_from_a_text_need_not_answer_as_before() -> None:
    assert [QUANTIZERS["qat"].far(QuantizeSpec.of(method="qat", distill=distill)) for distill in (True, False)] == [0.5, None]


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Another package's method, known in this process."""
    monkeypatch.setitem(QUANTIZERS.references, "clip", "tests.support.outside_quantizer:CLIP")
    yield
    sys.modules.pop("tests.support.outside_quantizer", None)


def test_another_packages_method_is_judged_likewise(outside: None, run: Callable[..., dict[str, float]]) -> None:
    assert ClipSpec.model_fields["clip"].default == 0.9
    assert run(method="clip", clip=0.99, grid="int8")["rtn_loss"] > 0
    with pytest.raises(StageError, match=f"^clip on int8: {TOLD.pattern}"):
        run(method="clip", clip=0.2, grid="int8")


def test_weights_that_are_no_numbers_fail_by_name(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    scales = interface.start_scales
    monkeypatch.setattr(interface, "start_scales", lambda *args: scales(*args) * float("inf"))
    with pytest.raises(StageError, match=r"rtn made NaN or infinite weights of model\.\S+; do not use it"):
        run()


def test_rounding_in_place_is_what_the_rounding_stage_makes(trained: Path, text: Path, tmp_path: Path) -> None:
    """On the grids of the result: those of mixed precision, and a head in float."""
    model = opening.load_model(trained)
    blocks = example_blocks(trained, model.config, text, 32, limit=4, seed=0)
    spec = QuantizeSpec.of(grid="int4", head=None, **SIZES)
    finer = {"model.layers.0.mlp.down_proj.weight": interface.grid_named("int8-g32")}
    given = interface.QuantizationInput(spec, trained, model, blocks, text, 0, Progress(), finer=finer)
    expected = rtn.choose(given).quantized
    other = opening.load_model(trained)
    for weight in other.parameters():
        weight.data.mul_(3)
    round_in_place(other, given, given.grids)
    for name, weight in opening.load_model(trained).state_dict().items():
        found = expected.dequantize(name) if name in expected.q else weight
        assert torch.equal(other.state_dict()[name], found), name


def test_the_noise_is_what_resampling_the_windows_shows() -> None:
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 60, (40,), generator=draw).double()
    rtn_nats = tokens * (2 + 0.3 * torch.randn(40, generator=draw).double())
    result = rtn_nats + tokens * (0.01 + 0.05 * torch.randn(40, generator=draw).double())
    judgement = Judgement.of((result, tokens), (rtn_nats, tokens), 0.005)
    rows = torch.randint(40, (20000, 40), generator=draw)
    spread = ((result - rtn_nats)[rows].sum(1) / tokens[rows].sum(1)).std().item()
    assert judgement.rtn_loss == pytest.approx((rtn_nats.sum() / tokens.sum()).item())
    assert judgement.allowed == pytest.approx(SIGMAS * spread + 0.005 * judgement.rtn_loss, rel=0.05)


def test_the_answers_that_are_looked_at_are_those_that_are_scored(
    trained: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opening.load_model(trained)
    blocks = example_blocks(trained, model.config, text, 32, limit=3, seed=0)
    with torch.no_grad():
        expected = model(input_ids=blocks.to(model.device)).logits.float().cpu()
    monkeypatch.setattr(losses, "COLUMNS", 100)
    seen = losses.block_answers(model, blocks)[2]
    step = -(-expected.shape[-1] // 100)
    torch.testing.assert_close(seen[:, :-1], (expected - expected[..., ::step].mean(-1, keepdim=True))[:, :-1, ::step])
    assert not seen[:, -1].any()
    moved = (seen, seen, seen + 0.1 * seen)
    assert distance(moved, (seen, seen, seen)) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("found", "plain", "passes"),
    [(0.09, 0.0, True), (0.11, 0.0, False), (0.14, 0.05, True), (0.16, 0.05, False), (0.9, 0.7, True), (1.1, 0.7, False)],
)
def test_how_far_answers_may_be_from_the_checkpoints(found: float, plain: float, passes: bool) -> None:
    own = torch.ones(1, 1, 4)
    result, rtn, checkpoint = ((own, own, own * (1 + share**0.5)) for share in (found, plain, 0.0))
    with nullcontext() if passes else pytest.raises(StageError, match=rf"gptq: its answers .* are {found:.2g} from"):
        require_alike("gptq", result, rtn, checkpoint, 0.1)


@pytest.mark.parametrize(("windows", "share"), [(FEWEST, 0.005), (FEWEST - 1, 0.005 + LARGEST), (1, 0.005 + LARGEST)])
@pytest.mark.parametrize(("mean", "unit"), [(4.0, 4.0), (0.01, 1.0)])
def test_what_is_allowed_is_a_share_of_the_loss_or_of_a_nat(windows: int, share: float, mean: float, unit: float) -> None:
    tokens, nats = torch.full((windows,), 7.0).double(), torch.full((windows,), 7 * mean).double()
    for beyond in (0.99, 1.01):
        judgement = Judgement.of((nats + 7 * beyond * share * unit, tokens), (nats, tokens), 0.005)
        if beyond < 1:
            judgement.require("gptq on int4")
        else:
            with pytest.raises(StageError, match="gptq on int4"):
                judgement.require("gptq on int4")


def test_damage_is_no_noise_however_it_spreads() -> None:
    tokens, nats = torch.ones(16).double(), torch.full((16,), 2.0).double()
    broken = nats + torch.tensor([4.0] + [0.0] * 15).double()
    with pytest.raises(StageError, match=r"2\.25 nats where rounding to nearest has 2 \(0\.21 more"):
        Judgement.of((broken, tokens), (nats, tokens), 0.005).require("gptq on int4")


def test_no_number_passes_for_none() -> None:
    losses, tokens = torch.ones(FEWEST).double(), torch.ones(FEWEST).double()
    for result, plain in ((losses * torch.nan, losses), (losses, losses * torch.nan), (losses * torch.inf, losses)):
        with pytest.raises(StageError):
            Judgement.of((result, tokens), (plain, tokens), 0.005).require("gptq on int4")


def test_the_losses_of_the_windows_make_the_mean(trained: Path, text: Path) -> None:
    model = opening.load_model(trained)
    blocks = example_blocks(trained, model.config, text, 32, limit=5, seed=0)
    nats, counts = block_losses(model, blocks, batch=2)
    assert counts.tolist() == [31] * 5
    alone = [token_loss(model, block[None]).item() for block in blocks]
    torch.testing.assert_close(nats / counts, torch.tensor(alone).double(), rtol=1e-5, atol=0)
    assert mean_loss(model, blocks) == pytest.approx(sum(alone) / 5, rel=1e-5)
