"""The train stage and the training loop under it."""

from __future__ import annotations

import hashlib
import json.scanner
import math
from pathlib import Path

import pytest
import torch

from featherweight.checkpoint import opening
from featherweight.checkpoint.tokenizer import load_tokenizer
from featherweight.errors import DataError, DivergenceError, RecipeError, StageError
from featherweight.progress import Progress
from featherweight.text.documents import Document, write_documents
from featherweight.text.tokens import token_blocks
from featherweight.training import loop
from featherweight.training.losses import mean_loss, token_loss
from featherweight.training.muon import Muon, orthogonal
from featherweight.training.optimizer import adamw, rate_share
from featherweight.training.plan import TrainingPlan
from featherweight.training.spec import TrainSpec
from tasks.train import new_model, train, train_tokenizer
from tests.support.families import tiny_model as family_model

SPEC = TrainSpec(
    vocab_size=384,
    hidden_size=32,
    intermediate_size=64,
    layers=2,
    heads=4,
    kv_heads=2,
    context=32,
    steps=200,
    batch=4,
    learning_rate=1e-2,
)
TRICKY = [
    "def f(x):\n\treturn x  # Ünïcödé, 漢字, 🎉\r\n",
    "  leading and trailing  ",
    "\x00\x07 control",
    "don't  do . this , please !",
    "<|bos|> typed by hand",
]


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_documents(folder, [Document("scanner", Path(json.scanner.__file__).read_text())])
    return folder


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    out = tmp_path_factory.mktemp("trained")
    return out, dict(train(SPEC, text=text, out=out, seed=3))


class Steps(Progress):
    """Remembers what a stage reports."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, float]] = []

    def step(self, done: int, total: int, **values: float) -> None:
        self.seen.append((done, total, values["loss"]))


@pytest.mark.slow
def test_the_loss_falls_and_the_result_is_a_complete_checkpoint(trained: tuple[Path, dict[str, float]]) -> None:
    out, metrics = trained
    assert metrics["loss_last"] < metrics["loss_first"] - 1.5
    assert metrics["tokens"] == 200 * 4 * 32
    files = {path.name for path in out.iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert files == expected
    model = opening.load_model(out)
    assert model.config.model_type == "llama"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert opening.parameters(model) == metrics["parameters"]


@pytest.mark.slow
def test_the_saved_model_speaks_with_its_tokenizer(trained: tuple[Path, dict[str, float]]) -> None:
    out, _ = trained
    tokenizer, model = load_tokenizer(out), opening.load_model(out)
    ids = tokenizer("import json", return_tensors="pt")
    assert ids["input_ids"][0, 0] == tokenizer.bos_token_id
    answer = model.generate(**ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert answer.shape[1] == ids["input_ids"].shape[1] + 5
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize("string", TRICKY)
def test_the_tokenizer_round_trips_any_text(trained: tuple[Path, dict[str, float]], string: str) -> None:
    tokenizer = load_tokenizer(trained[0])
    ids = tokenizer(string, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == string
    assert max(ids) < len(tokenizer) == 384


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(text: Path, tmp_path: Path) -> None:
    spec = SPEC.model_copy(update={"steps": 5})
    folders = [tmp_path / name for name in ("one", "again", "other")]
    for folder, seed in zip(folders, (1, 1, 2), strict=True):
        folder.mkdir()
        train(spec, text=text, out=folder, seed=seed)
    one, again, other = map(digest, folders)
    assert one == again
    assert one["model.safetensors"] != other["model.safetensors"]
    assert one["tokenizer.json"] == other["tokenizer.json"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": 30}, "hidden_size 30"),
        ({"hidden_size": 36}, "hidden_size 36"),
        ({"kv_heads": 3}, "kv_heads 3"),
        ({"vocab_size": 200}, "vocab_size 200"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change: dict[str, int], named: str, text: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=named):
        train(SPEC.model_copy(update=change), text=text, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_empty_text_is_refused(tmp_path: Path) -> None:
    write_documents(tmp_path / "empty", [])
    with pytest.raises(DataError, match="empty"):
        train(SPEC, text=tmp_path / "empty", out=tmp_path)


def test_the_tokenizer_reads_no_more_than_it_is_told(tmp_path: Path) -> None:
    write_documents(tmp_path, [Document("a", "alpha " * 100), Document("b", "omegaomega " * 1000)])
    tokenizer = train_tokenizer(tmp_path, SPEC.model_copy(update={"tokenizer_bytes": 600}))
    assert len(tokenizer.tokenize("alpha")) == 1
    assert len(tokenizer.tokenize("omega")) > 2


def tiny_model(seed: int = 0) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))


def test_a_new_model_is_undecided(text: Path) -> None:
    tokenizer = train_tokenizer(text, SPEC)
    model = new_model(SPEC, tokenizer, seed=0)
    blocks = token_blocks(text, tokenizer, 32)
    assert mean_loss(model, blocks) == pytest.approx(math.log(384), abs=0.1)


def test_every_step_is_reported_and_the_losses_are_returned() -> None:
    listener = Steps()
    blocks = torch.randint(64, (6, 16))
    losses = loop.train_loop(tiny_model(), blocks, TrainingPlan(7, 4, 1e-3), progress=listener)
    assert listener.seen == [(step + 1, 7, loss) for step, loss in enumerate(losses)]


def test_divergence_names_the_step_and_the_losses() -> None:
    blocks = torch.randint(64, (32, 16))
    with pytest.raises(StageError, match=r"diverged at step \d+: .*last losses: .*lower learning_rate"):
        loop.train_loop(tiny_model(), blocks, TrainingPlan(200, 4, 50.0))


@pytest.mark.parametrize("steps", [1, 4, 15])
def test_a_run_too_short_for_a_trend_is_judged_by_its_end(steps: int) -> None:
    blocks = torch.randint(64, (8, 16))
    with pytest.raises(DivergenceError, match=rf"diverged at step {steps}: the first batch's loss has run away from") as caught:
        loop.train_loop(tiny_model(), blocks, TrainingPlan(steps, 4, 20.0))
    assert len(caught.value.losses) == steps


def test_batches_harder_than_the_first_are_no_divergence() -> None:
    blocks, model = torch.randint(64, (4, 16)), tiny_model()
    easy = blocks[loop.batch_order(4, 1, 4, seed=0)[0, 0]]

    def loss(ids: torch.Tensor) -> torch.Tensor:
        return token_loss(model, ids) * (0.01 if torch.equal(ids[0], easy) else 2.0)

    losses = loop.train_loop(model, blocks, TrainingPlan(4, 1, 1e-3), loss_fn=loss)
    assert min(losses[1:]) > 1.5 * losses[0] + 2


def test_a_nan_weight_stops_the_first_step() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[3] = math.nan
    with pytest.raises(StageError, match="diverged at step 1: loss nan"):
        loop.train_loop(model, torch.randint(64, (4, 16)), TrainingPlan(5, 4, 1e-3))


def test_no_layer_is_dropped_while_training_and_the_rate_is_kept() -> None:
    model = family_model("m2m_100", decoder_layerdrop=0.9)
    rates = [model.model.encoder.layerdrop, model.model.decoder.layerdrop]
    seen: set[float] = set()
    model.model.decoder.register_forward_pre_hook(lambda module, _: seen.add(module.layerdrop))
    loop.train_loop(model, torch.randint(5, 40, (4, 16)), TrainingPlan(2, 4, 1e-3))
    assert seen == {0.0}
    assert [model.model.encoder.layerdrop, model.model.decoder.layerdrop] == rates == [0.05, 0.9]


def test_an_interrupt_leaves_the_loop() -> None:
    class Interrupt(Progress):
        def step(self, done: int, total: int, **values: float) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.train_loop(tiny_model(), torch.randint(64, (4, 16)), TrainingPlan(5, 4, 1e-3), progress=Interrupt())


def test_an_epoch_reads_every_block_once() -> None:
    order = loop.batch_order(blocks=10, batch=4, steps=5, seed=0).flatten()
    assert sorted(order[:10].tolist()) == sorted(order[10:].tolist()) == list(range(10))
    assert order[:10].tolist() != order[10:].tolist()


def test_the_rate_warms_up_and_falls() -> None:
    rates = [rate_share(step, 100, 0.1, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)


def test_the_loss_is_that_of_transformers() -> None:
    model, ids = tiny_model(), torch.randint(64, (3, 16))
    expected = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(token_loss(model, ids), expected)
    assert mean_loss(model, ids, batch=2) == pytest.approx(expected.item(), abs=1e-6)


def test_norms_are_not_decayed() -> None:
    model = tiny_model()
    groups = adamw(model, 1e-3, 0.1).param_groups
    decays = {weight: group["weight_decay"] for group in groups for weight in group["params"]}
    assert decays[model.model.norm.weight] == 0
    assert decays[model.model.layers[0].mlp.up_proj.weight] == 0.1
    assert len(decays) == len(list(model.parameters()))


@pytest.mark.parametrize("shape", [(3, 24, 32), (2, 16, 40), (2, 40, 16)])
def test_orthogonal_keeps_the_directions_and_levels_the_singular_values(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    result = u.mT @ orthogonal(matrices) @ vh.mT
    diagonal = result.diagonal(dim1=1, dim2=2)
    assert ((diagonal > 0.5) & (diagonal < 1.3)).all()
    assert (result - torch.diag_embed(diagonal)).abs().max() < 1e-4


def test_muon_updates_every_weight_and_only_decays_the_matrices() -> None:
    model = tiny_model()
    before = [weight.detach().clone() for weight in model.parameters()]
    loop.train_loop(model, torch.randint(64, (4, 16)), TrainingPlan(2, 4, 1e-3, optimizer="muon"))
    assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    *others, matrices = Muon(model, 1e-3, 0.1).param_groups
    assert matrices["weight_decay"] == 0.1
    assert [group["weight_decay"] for group in others] == [0]
    assert all("proj" in name for name, weight in model.named_parameters() if weight in set(matrices["params"]))


@pytest.mark.slow
def test_muon_learns_in_fewer_steps_than_adamw(text: Path) -> None:
    tokenizer = train_tokenizer(text, SPEC)
    blocks = token_blocks(text, tokenizer, 32)
    lasts = {}
    for optimizer in ("adamw", "muon"):
        model = new_model(SPEC, tokenizer, seed=0)
        losses = loop.train_loop(model, blocks, TrainingPlan(150, 4, 6e-3, optimizer=optimizer))
        lasts[optimizer] = sum(losses[-10:]) / 10
    assert lasts["muon"] < lasts["adamw"] - 0.3
