"""GPTQ on a GPU chooses the weights that it chooses on a CPU, on grids whose scales have a sign too."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from featherweight.checkpoint import opening
from featherweight.errors import StageError
from featherweight.model.quantized_weights import QuantizedWeights
from featherweight.quantization import patches
from featherweight.quantization.spec import QuantizeSpec
from featherweight.system.device import CPU, VARIABLE
from featherweight.text.documents import Document, write_documents
from tasks.quantize import quantize
from tests.conftest import STORY

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
SIGNED = ("int4", "int4-g32", "int8-full", "int8-g32")
SAME = 0.95
"""Share of the integers of a matrix: one near the middle of two steps may fall to either side, and moves its row's later ones."""


def rounded(checkpoint: Path, text: Path, grid: str, out: Path) -> QuantizedWeights:
    """What the stage makes on `grid`, on the device that this process has."""
    out.mkdir(parents=True)
    spec = QuantizeSpec.of(method="gptq", grid=grid, head=None, samples=32, sequence=32)
    quantize(spec, checkpoint=checkpoint, text=text, calibration=text, out=out)
    found = QuantizedWeights.read(out)
    assert found is not None
    return found


def all_rounded(checkpoint: Path, text: Path, out: Path) -> None:
    for grid in SIGNED:
        rounded(checkpoint, text, grid, out / grid)


def assert_same(found: QuantizedWeights, expected: QuantizedWeights) -> None:
    """The same scales, and the same integers but for those that rounding may take to either side."""
    assert found.q.keys() == expected.q.keys()
    for name, q in expected.q.items():
        torch.testing.assert_close(found.scales[name], expected.scales[name], rtol=1e-6, atol=0)
        steps = (found.q[name].int() - q.int()).abs().float()
        assert (steps == 0).float().mean() > SAME and steps.mean() < 0.1, name


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_documents(folder, [Document(str(place), f"{place} {STORY}") for place in range(24)])
    return folder


@pytest.fixture(scope="module")
def on_cpu(tiny_checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stage's results by grid, of a process that sees no GPU."""
    out = tmp_path_factory.mktemp("cpu")
    made = f"from {__name__} import *; all_rounded(*map(Path, sys.argv[1:]))"
    hidden = {"CUDA_VISIBLE_DEVICES": "", VARIABLE: CPU}
    environment = os.environ | hidden | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", made, str(tiny_checkpoint), str(text), str(out)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return out


@pytest.mark.slow
def test_another_process_rounds_alike(on_cpu: Path, tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """So that what differs on CUDA is CUDA's; and the comparison sees what the kernel did."""
    expected = QuantizedWeights.read(on_cpu / "int4-g32")
    assert expected is not None
    if not torch.cuda.is_available():
        assert_same(rounded(tiny_checkpoint, text, "int4-g32", tmp_path / "here"), expected)
    name = next(iter(expected.q))
    expected.q[name][expected.scales[name].repeat_interleave(32, 1) < 0] = 0
    other = QuantizedWeights.read(on_cpu / "int4-g32")
    assert other is not None
    with pytest.raises(AssertionError, match=name):
        assert_same(other, expected)


@pytest.mark.cuda
@NEEDS_CUDA
@pytest.mark.parametrize("grid", SIGNED)
def test_cuda_chooses_the_weights_of_a_cpu(grid: str, on_cpu: Path, tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    expected = QuantizedWeights.read(on_cpu / grid)
    assert expected is not None
    assert next(opening.load_model(tiny_checkpoint).parameters()).is_cuda
    assert_same(rounded(tiny_checkpoint, text, grid, tmp_path / "cuda"), expected)


@pytest.mark.cuda
@NEEDS_CUDA
def test_the_librarys_own_kernel_is_still_wrong_and_does_not_pass(
    tiny_checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The day that it is right this fails: then `patches.eager_gptq` can go."""
    monkeypatch.setattr(patches, "eager_gptq", nullcontext)
    with pytest.raises((StageError, AssertionError)):
        found = rounded(tiny_checkpoint, text, "int4-g32", tmp_path / "kernel")
        with monkeypatch.context() as eager:
            eager.setenv(patches.GPTQ_KERNEL, "1")
            assert_same(found, rounded(tiny_checkpoint, text, "int4-g32", tmp_path / "eager"))
