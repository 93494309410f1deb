"""Training in several processes, most of it with a model divided among them (FSDP2 over gloo), learns what one process learns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight.checkpoint import opening
from featherweight.distillation.spec import DistillSpec
from featherweight.errors import StageError
from featherweight.progress import Progress
from featherweight.quantization.spec import QuantizeSpec
from featherweight.spec import Spec
from featherweight.text.documents import Document, write_documents
from featherweight.training.data_parallel import DataParallelGroup, launched, leads
from featherweight.training.launch import run_in_processes
from featherweight.training.spec import FinetuneSpec, LoraSpec, TrainSpec
from featherweight.training.threads import cores
from tasks.distill import distill
from tasks.finetune import finetune
from tasks.quantize import quantize
from tasks.train import train
from tests.support.notes import Told

PARTS = {"processes": 2, "sharded": True}
SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 50, "layers": 2, "heads": 2, "kv_heads": 1, "context": 32}


class CasesSpec(Spec):
    """Of no case anything is asked."""


Folders = dict[str, Path]


def tuned(told: Told, parts: dict[str, Any], out: Path, **folders: Path) -> dict[str, float]:
    """All weights, in parts of batches, beside held-out text of an odd number of blocks."""
    options = {"steps": 6, "batch": 4, "sequence": 32, "learning_rate": 5e-3, "evaluate_every": 3, "accumulate": 2}
    spec = FinetuneSpec.model_validate({**options, "save_every_s": 0, **parts})
    return dict(finetune(spec, calibration=folders["text"], scratch=out / "scratch", out=out, progress=told, **folders))


def interrupted(told: Told, parts: dict[str, Any], out: Path, **folders: Path) -> dict[str, float]:
    """The same, stopped after four steps and begun again."""
    if launched():
        with pytest.raises(KeyboardInterrupt):
            tuned(Told(stop_at=4), parts, out, **folders)
        assert {path.name for path in (out / "scratch").iterdir()} == {f"3-{rank}-training.safetensors" for rank in (0, 1)}
    return tuned(told, parts, out, **folders)


def adapted(told: Told, parts: dict[str, Any], out: Path, **folders: Path) -> dict[str, float]:
    """Adapters beside weights that stay."""
    spec = FinetuneSpec(steps=3, batch=4, sequence=32, lora=LoraSpec(), **parts)
    return dict(finetune(spec, out=out, progress=told, **folders))


def distilled(told: Told, parts: dict[str, Any], out: Path, **folders: Path) -> dict[str, float]:
    """A student whose hidden states are matched by projections, which are trained too and are no part of the model."""
    spec = DistillSpec(steps=3, batch=4, sequence=32, layers=1, hidden_weight=1.0, **parts)
    return dict(distill(spec, out=out, progress=told, **folders))


def begun(told: Told, parts: dict[str, Any], out: Path, checkpoint: Path, text: Path) -> dict[str, float]:
    """Muon, which needs matrices as wholes."""
    return dict(train(TrainSpec(**SIZES, steps=3, batch=4, **parts), text=text, out=out, progress=told))


def rounded(told: Told, parts: dict[str, Any], out: Path, **folders: Path) -> dict[str, float]:
    """QAT, every process with all weights."""
    processes = {name: value for name, value in parts.items() if name != "sharded"}
    spec = QuantizeSpec.of(method="qat", grid="int4-g32", start="rtn", steps=3, batch=4, sequence=32, samples=8, **processes)
    return dict(quantize(spec, calibration=folders["text"], out=out, progress=told, **folders))


CASES: dict[str, Callable[..., dict[str, float]]] = {
    "tuned": interrupted, "adapted": adapted, "distilled": distilled, "begun": begun, "rounded": rounded
}  # fmt: skip


def run_all(spec: CasesSpec, *, checkpoint: Path, text: Path, out: Path, seed: int, progress: Progress) -> dict[str, float]:
    """Every case, here or in one of two processes; what the first was told goes to `out`."""
    for name, case in CASES.items():
        told = Told()
        (out / name).mkdir(exist_ok=True)
        metrics = case(told, PARTS if launched() else {}, out / name, checkpoint=checkpoint, text=text)
        if leads():
            (out / f"{name}.json").write_text(json.dumps({"losses": told.losses, "notes": told.notes, "metrics": metrics}))
    return {}


@pytest.mark.slow
@pytest.mark.skipif(cores() < 2, reason="needs two cores")
def test_two_processes_learn_what_one_does(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """One pair of processes for all cases: starting it takes longer than all of them."""
    write_documents(tmp_path / "text", [Document("json", Path(json.__file__).read_text())])
    folders = {"checkpoint": tiny_checkpoint, "text": tmp_path / "text"}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    run_all(CasesSpec(), out=tmp_path / "one", seed=0, progress=Progress(), **folders)
    run_in_processes(f"{__name__}:run_all", CasesSpec(), {**folders, "out": tmp_path / "two"}, 0, 2, Progress())
    for name in CASES:
        one, two = (json.loads((tmp_path / where / f"{name}.json").read_text()) for where in ("one", "two"))
        assert two["losses"] == pytest.approx(one["losses"], abs=1e-4), name
        for metric in ("held_out_loss", "student_loss", "loss_after"):
            assert two["metrics"].get(metric) == pytest.approx(one["metrics"].get(metric), abs=1e-4), (name, metric)
        alone, together = (opening.load_model(tmp_path / where / name) for where in ("one", "two"))
        assert together.config.to_diff_dict() == alone.config.to_diff_dict()
        if name != "rounded":  # a weight between two integers may fall to either
            for a, b in zip(alone.parameters(), together.parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)
        assert any(note == "resuming at step 3" for note in two["notes"]) == (name == "tuned")


def test_one_process_has_nothing_to_share() -> None:
    with pytest.raises(ValueError, match="sharded plays no role in one process"):
        FinetuneSpec(sharded=True)


def test_processes_that_begin_with_different_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    group, model = DataParallelGroup(), torch.nn.Linear(2, 2)
    monkeypatch.setattr(group, "size", 2)
    monkeypatch.setattr(group, "rows", lambda row: torch.stack([row, row]))
    group._require_alike(model)
    monkeypatch.setattr(group, "rows", lambda row: torch.stack([row, row + 1]))
    with pytest.raises(StageError, match="begin with different weights"):
        group._require_alike(model)
