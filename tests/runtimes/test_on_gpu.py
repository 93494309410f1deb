"""Engines on a GPU: they compute what PyTorch computes, from where they say, and tell honest times. Skipped without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from featherweight.distillation.spec import GenerateSpec
from featherweight.measure.measurement import Comparison
from featherweight.measure.spec import WorkloadSpec
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.client import open_worker
from featherweight.runtimes.spec import ServingSpec
from featherweight.store.served_folder import Serving
from featherweight.system.device import CUDA
from featherweight.system.machine import describe
from tasks.evaluate import evaluate
from tasks.export import export
from tasks.generate import generate
from tests.conftest import STORY
from tests.support.serving_models import serving_spec, write_text

pytestmark = [pytest.mark.cuda, pytest.mark.engine, pytest.mark.slow]
SPECS = [
    *(serving_spec(engine="torch", compute_type=name) for name in ("float32", "float16", "bfloat16", "nf4", "llm.int8")),
    *(serving_spec(engine="torch-compile", precision=name) for name in ("float32", "float16", "bfloat16")),
    *(serving_spec(engine=name) for name in ("torchao-int8", "torchao-int4", "torchao-int8-dynamic")),
    *(
        serving_spec(engine="ctranslate2", compute_type=name)
        for name in ("float32", "float16", "bfloat16", "int8", "int8_float32", "int8_float16", "int8_bfloat16")
    ),
    serving_spec(engine="onnxruntime-genai", precision="int4"),
]


def named(spec: ServingSpec) -> str:
    return f"{spec.engine} {getattr(spec, 'compute_type', getattr(spec, 'precision', ''))}".strip()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield write_text(tmp_path_factory.mktemp("text"), STORY)


def served_on_gpu(spec: ServingSpec, checkpoint: Path, text: Path, out: Path) -> dict[str, float]:
    """Written and held to PyTorch, or skipped with the reason why this machine cannot."""
    runtime = RUNTIMES[spec.engine]
    if reason := runtime.machine_refusal(spec, describe()) or runtime.device_refusal(spec, CUDA, describe()) or runtime.missing():
        pytest.skip(reason)
    out.mkdir()
    return dict(export(spec, checkpoint=checkpoint, calibration=text, out=out))


@pytest.mark.parametrize("spec", SPECS, ids=named)
def test_an_engine_serves_from_the_gpu_what_pytorch_computes(
    spec: ServingSpec, tiny_checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    metrics = served_on_gpu(spec, tiny_checkpoint, text, tmp_path / "served")
    assert metrics["parity_max_abs"] >= 0  # it was compared at all
    assert Serving.read(tmp_path / "served").device == CUDA
    with open_worker(tmp_path / "served", threads=1, max_tokens=64, max_batch=2) as worker:
        assert worker.device == CUDA
        worker.time([[5, 6, 7], [8, 9, 10]], 8)
        timing = worker.time([[5, 6, 7], [8, 9, 10]], 8)
        assert 0 < timing.ttft_s <= timing.total_s
        written = worker.generate([[5, 6, 7]], 8)
        assert len(written[0]) == 8
        assert worker.generate([[5, 6, 7]], 8) == written  # a graph that is replayed starts from an empty cache


def test_a_teacher_on_the_gpu_writes_for_students(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """Its model lives on the GPU, and CTranslate2's converter crashes at a GPU's addresses."""
    metrics = generate(GenerateSpec(samples=2, sequence=32, prompt_tokens=16), checkpoint=tiny_checkpoint, text=text, out=tmp_path)
    assert metrics["documents"] == 2 and metrics["tokens_per_s"] > 0


def test_a_measurement_says_where_it_was_made(tiny_checkpoint: Path, text: Path, tmp_path: Path) -> None:
    served_on_gpu(SPECS[0], tiny_checkpoint, text, tmp_path / "baseline")
    spec = WorkloadSpec(prompt_tokens=8, new_tokens=8, batch_sizes=(1,), rounds=2, windows=2, window_tokens=32)
    out = tmp_path / "out"
    out.mkdir()
    found = evaluate(spec, served=tmp_path / "baseline", baseline=tmp_path / "baseline", evaluation=text, out=out)
    assert found["on_gpu"] == found["baseline_on_gpu"] == 1.0
    assert Comparison.read(out).variant.device == CUDA
    assert found["peak_memory_bytes"] > found["peak_tensor_bytes"] > 0 and found["peak_host_memory_bytes"] > 1e8
