"""Early stop, gradient accumulation, and going on after a kill with the same bits."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model

from featherweight.progress import Progress
from featherweight.training import loop
from featherweight.training.losses import mean_loss
from featherweight.training.plan import HeldOut, TrainingPlan
from featherweight.training.state import FILE, Record
from tests.support.paths import ROOT

BLOCKS = torch.randint(64, (12, 16), generator=torch.Generator().manual_seed(0))
# A run of 12 steps with dropout, held-out text and split batches; argv: the scratch folder, where the weights go, and the step
# after which it goes on no more.
PROGRAM = """
import sys
from pathlib import Path
from safetensors.torch import save_model
from tests.training.test_state import Printed, long_run, model

trained = model()
long_run(trained, Path(sys.argv[1]), Printed(int(sys.argv[3])))
save_model(trained, sys.argv[2])
"""


class Printed(Progress):
    """Every step on a line of its own; at the step `last` it waits until it is killed."""

    def __init__(self, last: int) -> None:
        self.last = last

    def step(self, done: int, total: int, **values: float) -> None:
        print(done, flush=True)
        if done == self.last:
            signal.pause()

    def note(self, text: str) -> None:
        print(text, flush=True)


def long_run(trained: torch.nn.Module, scratch: Path | None, progress: Progress) -> None:
    held_out = HeldOut(BLOCKS[:5], every=3)
    options = {"steps": 12, "seed": 3, "accumulate": 2, "held_out": held_out, "progress": progress}
    run(trained, scratch, **options)


def model(seed: int = 0, dropout: float = 0.2) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, attention_dropout=dropout, **sizes))


def start(scratch: Path, out: Path, last: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(scratch), str(out), str(last)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    killed = start(tmp_path, tmp_path / "never", last=11)
    assert killed.stdout
    for line in killed.stdout:
        if line == "7\n":  # saved after 6 steps, or after some more by the time that the signal comes
            killed.send_signal(signal.SIGKILL)
            break
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "never").exists()
    told = start(tmp_path, tmp_path / "out").communicate(timeout=600)[0].splitlines()
    assert any(line in told for line in [f"resuming at step {step}" for step in range(6, 12)])
    whole, resumed = model(), model(seed=1)
    long_run(whole, None, Progress())
    load_model(resumed, tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


class Interrupt(Progress):
    """Ctrl-C at a step; remembers what it was told before and after."""

    def __init__(self, at: int) -> None:
        self.at, self.steps, self.notes = at, [], []

    def step(self, done: int, total: int, **values: float) -> None:
        self.steps.append((done, values["loss"]))
        if done == self.at:
            raise KeyboardInterrupt

    def note(self, text: str) -> None:
        self.notes.append(text)


def interrupted(scratch: Path, at: int = 5, **options: object) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(model(), scratch, progress=Interrupt(at), **options)


def run(trained: torch.nn.Module, scratch: Path | None, **options: object) -> list[float]:
    settings = {"steps": 8, "batch": 4, "learning_rate": 1e-2, "save_every_s": 0.0, "scratch": scratch}
    beside = {name: options.pop(name) for name in ("progress", "record", "loss_fn") if name in options}
    return loop.train_loop(trained, BLOCKS, TrainingPlan(**(settings | options)), **beside)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_tells_its_whole_curve_and_ends_with_the_same_bits(optimizer: str, tmp_path: Path) -> None:
    one, resumed = model(), model(seed=9)
    whole = run(one, None, optimizer=optimizer)
    interrupted(tmp_path, optimizer=optimizer)
    listener = Interrupt(at=-1)
    assert run(resumed, tmp_path, progress=listener, optimizer=optimizer) == whole
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), resumed.parameters(), strict=True))
    assert listener.notes == ["resuming at step 4"]
    assert listener.steps == list(enumerate(whole, 1))


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"steps": 9}, {"seed": 1}, {"learning_rate": 1e-3}])
def test_the_state_of_another_run_is_not_taken_up(change: dict[str, float], tmp_path: Path) -> None:
    interrupted(tmp_path)
    listener = Interrupt(at=-1)
    losses = run(model(), tmp_path, progress=listener, **change)
    assert listener.notes == []
    assert losses == run(model(), None, **change)


@pytest.mark.slow
def test_a_damaged_state_is_not_taken_up(tmp_path: Path) -> None:
    interrupted(tmp_path)
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole[: len(whole) // 2])
    assert run(model(), tmp_path) == run(model(), None)


def test_nothing_is_saved_before_its_time(tmp_path: Path) -> None:
    run(model(), tmp_path, save_every_s=3600)
    assert not list(tmp_path.iterdir())


def test_the_state_is_one_safetensors_file_without_a_copy_of_frozen_weights(tmp_path: Path) -> None:
    trained = model()
    trained.model.embed_tokens.weight.requires_grad_(False)
    run(trained, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    names = load_file(tmp_path / FILE).keys()
    assert "weight.lm_head.weight" in names
    assert not any("embed_tokens" in name for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 3, 4])
def test_an_accumulated_step_is_the_step_of_the_whole_batch(parts: int) -> None:
    one, many = model(dropout=0), model(dropout=0)
    expected = run(one, None)
    losses = run(many, None, accumulate=parts)
    assert losses == pytest.approx(expected, abs=1e-5)
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)


def test_training_stops_early_and_keeps_the_best_weights() -> None:
    """The model learns its text by heart, which makes it worse on any other."""
    other = torch.randint(64, (6, 16), generator=torch.Generator().manual_seed(1))
    seen = model(dropout=0)
    held_out, record = HeldOut(other, every=2, patience=3), Record()
    losses = run(seen, None, steps=100, held_out=held_out, record=record)
    best = record.best_step
    assert best is not None
    assert len(losses) == best + 3 * 2 < 100
    assert record.held_out[best] == min(record.held_out.values()) < record.held_out[len(losses)]
    assert mean_loss(seen, other) == pytest.approx(record.held_out[best], abs=1e-6)


def test_a_model_that_training_only_makes_worse_is_left_as_it_was() -> None:
    trained, own = model(dropout=0), torch.arange(16)[None].repeat(4, 1)
    loop.train_loop(trained, own, TrainingPlan(20, 4, 1e-2))
    before = [weight.detach().clone() for weight in trained.parameters()]
    held_out = HeldOut(own, every=4, patience=1)
    metrics = loop.timed_loop(trained, BLOCKS, TrainingPlan(12, 4, 0.3, held_out=held_out))
    assert metrics["best_step"] == 0
    assert metrics["steps"] == 4
    assert metrics["held_out_loss"] == metrics["held_out_first"]
    assert all(torch.equal(a, b) for a, b in zip(before, trained.parameters(), strict=True))


def test_a_run_stopped_early_and_killed_then_does_not_go_on(tmp_path: Path) -> None:
    other = torch.randint(64, (6, 16), generator=torch.Generator().manual_seed(1))
    options = {"steps": 100, "held_out": HeldOut(other, every=2, patience=3)}
    first, again = model(dropout=0), model(seed=5, dropout=0)
    losses = run(first, tmp_path, **options)
    assert run(again, tmp_path, **options) == losses
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
