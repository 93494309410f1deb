"""A variant with fewer tokens is measured on the very text of its baseline."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from featherweight.checkpoint.tokenizer import load_tokenizer
from featherweight.errors import DataError
from featherweight.measure.spec import WorkloadSpec
from featherweight.measure.speed import Shape
from featherweight.pruning.spec import PruneSpec
from featherweight.runtimes.workload import Workload
from featherweight.store.served_folder import Serving
from featherweight.text.documents import Document, write_documents
from tests.support import tokenizers as small
from tests.support.families import tiny_model
from tests.support.in_process import InProcess
from tests.support.pruning import SMALL, pruned
from tests.support.serving_models import serving_spec

SPEC = WorkloadSpec(prompt_tokens=8, new_tokens=4, windows=4, window_tokens=16)
KNOWN, OTHER = "The stone and the stone. " * 4, "The river and the stone. " * 4


def checkpoint(folder: Path) -> Path:
    tokenizer = small.byte_level("<s> $A")
    tokenizer.save_pretrained(folder)
    tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=20).save_pretrained(folder)
    return folder


def text(folder: Path, *texts: str) -> Path:
    write_documents(folder, [Document(str(number), one) for number, one in enumerate(texts)])
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The baseline and what is left of it, each as PyTorch serves it, up to 20 tokens."""
    root = tmp_path_factory.mktemp("served")
    source = checkpoint(root / "source")
    pruned(PruneSpec.of(**SMALL, method="vocabulary"), source, text(root / "known", KNOWN), root / "out")
    for folder in (source, root / "out"):
        Serving("torch", max_tokens=20).write(folder)
    return source, root / "out"


def test_windows_stand_for_the_same_bytes_and_covered_ones_lose_nothing(served: tuple[Path, Path], tmp_path: Path) -> None:
    source, out = served
    workload = Workload.read(SPEC, source, text(tmp_path / "text", KNOWN, OTHER))
    own = workload.for_served(out, source)
    assert own.quality_bytes == workload.quality_bytes
    assert len(own.windows) > len(workload.windows)  # those with a river are spelt in more tokens than are served
    assert max(len(window.ids) for window in own.windows) <= 20
    assert [len(prompt) for prompt in own.prompts(Shape(3, 8, 4))] == [8, 8, 8]
    with InProcess(source) as before, InProcess(out) as after:
        whole = [-math.fsum(row) for row in before.score(workload.windows)]
        left = own.by_window([-math.fsum(row) for row in after.score(own.windows)], math.fsum)
    covered = [set(load_tokenizer(source).convert_ids_to_tokens(window.ids)).isdisjoint({"Ġriver"}) for window in workload.windows]
    assert sorted(covered) == [False, True]
    assert all(ours < theirs for ours, theirs, known in zip(left, whole, covered, strict=True) if known)


def test_the_same_tokenizer_is_given_the_same_windows(served: tuple[Path, Path], tmp_path: Path) -> None:
    workload = Workload.read(SPEC, served[0], text(tmp_path / "text", KNOWN, OTHER))
    assert workload.for_served(served[0], served[0]) is workload


def test_one_window_of_text_says_nothing_of_a_loss(served: tuple[Path, Path], tmp_path: Path) -> None:
    short = text(tmp_path / "text", KNOWN)
    with pytest.raises(
        DataError, match="fills one window of at most 16 tokens, by which no loss of quality can be told; give more text"
    ):
        Workload.read(SPEC, served[0], short)
    assert len(Workload.read(SPEC.model_copy(update={"windows": 1}), served[0], short).windows) == 1


@pytest.mark.engine
def test_what_is_left_is_exported_and_keeps_parity(served: tuple[Path, Path], tmp_path: Path) -> None:
    from tasks.export import export

    (tmp_path / "out").mkdir()
    metrics = export(
        serving_spec(engine="ctranslate2"),
        checkpoint=served[1],
        calibration=text(tmp_path / "text", KNOWN, OTHER),
        out=tmp_path / "out",
    )
    assert metrics["parity_max_abs"] < 1e-4
    assert (tmp_path / "out" / "kept_tokens.json").is_file()
