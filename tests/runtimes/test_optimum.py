"""ONNX Runtime through Optimum: what is refused before anything is written, and that what it serves answers as PyTorch."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig, PreTrainedConfig

from featherweight.errors import RecipeError, ToolchainError
from featherweight.grid import GRIDS
from featherweight.model.facts import CheckpointFacts
from featherweight.progress import Progress
from featherweight.runtimes import answer_parity, doctor, parity
from featherweight.runtimes.build_process import run_build
from featherweight.runtimes.candidate import Candidate
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.interface import Grids
from featherweight.runtimes.optimum import known, mends, write
from featherweight.runtimes.writing import write_served
from featherweight.store.served_folder import Serving
from featherweight.system.device import CPU, CUDA
from featherweight.system.machine import Gpu, Machine, describe
from tests.support.families import write_pairs
from tests.support.heads import head_checkpoint, loaded, opened_vectors, sentence_files
from tests.support.in_process import InProcess
from tests.support.serving_models import serving_spec

OPTIMUM = RUNTIMES["onnxruntime"]
ABSENT = OPTIMUM.unwritable()
HERE = describe()
GPU = Machine("Linux", "x86_64", "some", frozenset(), 2, 2, 2**33, (Gpu("H200", 2**37, (9, 0)),))


def spec(**keys: Any) -> Any:
    return serving_spec(engine="onnxruntime", **keys)


@pytest.fixture
def lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toolchain that holds nothing but Optimum's two lists."""
    packages = tmp_path / "optimum" / "lib" / "python3.11" / "site-packages"
    exported, fused = packages / known.EXPORTED, packages / known.FUSED
    for file in (exported, fused):
        file.parent.mkdir(parents=True)
    exported.write_text('@register_tasks_manager_onnx("bert", *TASKS)\n@register_tasks_manager_onnx(\n    "t5",\n)\n')
    exported.write_text(exported.read_text() + '@register_tasks_manager_onnx("m2m_100", *TASKS)\n')
    fused.write_text('    _conf = {\n        "bert": "bert",\n        "m2m_100": "bart",\n    }\n')
    monkeypatch.setenv("FEATHERWEIGHT_TOOLCHAINS", str(tmp_path))
    known.names.cache_clear()
    yield tmp_path
    known.names.cache_clear()


@pytest.mark.parametrize(
    ("model_type", "level", "reason"),
    [
        ("bert", "O2", None),
        ("m2m_100", "O3", None),
        ("t5", None, None),
        ("t5", "O1", "knows no fusions for t5 models; say optimize: null"),
        ("lfm2", None, "does not export lfm2 models to ONNX; take another engine"),
    ],
)
def test_models_are_refused_by_optimums_own_lists(lists: Path, model_type: str, level: Any, reason: str | None) -> None:
    config = PreTrainedConfig(model_type=model_type)
    found = OPTIMUM.model_refusal(spec(optimize=level), Candidate(CheckpointFacts(config), 64))
    assert (found is None) if reason is None else reason in str(found)


def test_o4_is_for_cuda_and_says_so() -> None:
    four = spec(optimize="O4")
    assert "on CUDA GPUs alone, and there is none here; take O3" in str(
        OPTIMUM.machine_refusal(four, Machine(**vars(GPU) | {"gpus": ()}))
    )
    assert OPTIMUM.machine_refusal(four, GPU) is None and OPTIMUM.device_refusal(four, CUDA, GPU) is None
    assert "take O3" in str(OPTIMUM.device_refusal(four, CPU, GPU))
    assert "onnxruntime-gpu, its package for CUDA, is not installed" in str(OPTIMUM.device_refusal(four, CUDA, HERE))


@pytest.mark.parametrize(
    ("keys", "body", "reason"),
    [
        ({}, "int8", "would store rounded weights at full size"),
        ({}, None, None),
        ({"precision": "int8"}, "int8", None),
        ({"precision": "int4"}, "int4-g64", None),
        ({"precision": "int4"}, "int8", "8-bit grid, and precision int4 would round them again"),
        ({"precision": "int8"}, "fp8", "holds integers, not fp8"),
        ({"precision": "int8", "activations": "dynamic"}, "int8-full", None),
        ({"precision": "int8", "activations": "static"}, None, None),
        ({"precision": "int8", "activations": "dynamic"}, "int8-g32", "one scale per row, not int8-g32; take blocks"),
        ({"precision": "int4", "activations": "static"}, None, "one scale per row, not int4-g32; take blocks"),
        ({"precision": "int8", "optimize": "O4"}, "int8", "O4 computes in float16"),
    ],
)
def test_grids_are_multiplied_as_they_are_or_refused(keys: Any, body: str | None, reason: str | None) -> None:
    found = OPTIMUM.grid_refusal(Grids(GRIDS[body] if body else None), spec(**keys))
    assert (found is None) if reason is None else reason in str(found)


def test_without_its_toolchain_it_serves_and_does_not_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATHERWEIGHT_TOOLCHAINS", str(tmp_path))
    assert OPTIMUM.missing() is None
    assert "run `featherweight doctor --install optimum`" in str(OPTIMUM.unwritable())
    checks = {check.name: check for check in [*doctor._engines(HERE), *doctor._toolchains()]}
    assert checks["engine onnxruntime"].state == "missing"
    assert checks["toolchain optimum"].remedy == "run `featherweight doctor --install optimum`"
    with pytest.raises(RecipeError, match="unknown toolchain 'optimun'; did you mean 'optimum'"):
        doctor.install_toolchain("optimun")


def test_a_toolchain_that_does_not_install_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    failed = SimpleNamespace(returncode=1)
    monkeypatch.setattr("featherweight.system.toolchains.subprocess.run", lambda command, **_: ran.append(command) or failed)
    with pytest.raises(ToolchainError, match="toolchain 'optimum' could not be installed"):
        doctor.install_toolchain("optimum")
    assert ran[0][-3:] == ["--toolchain", "optimum", "--retry"]


def test_rotary_embeddings_are_said_in_the_older_words_too() -> None:
    linear = {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}
    found = mends.mended({"model_type": "llama", "rope_parameters": linear})
    assert (found["rope_theta"], found["rope_scaling"]) == (5e5, {"rope_type": "linear", "factor": 2.0})
    neox = {"model_type": "gpt_neox", "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 1.0}}
    assert mends.mended(neox)["rotary_pct"] == 1.0
    plain = mends.mended({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}})
    assert (plain["rope_theta"], plain["rope_scaling"], plain["partial_rotary_factor"]) == (1e4, None, 0.5)
    assert mends.mended({"model_type": "bert"}) == {"model_type": "bert"}
    for unscaled in ({"model_type": "mt5"}, {"model_type": "t5", "scale_decoder_outputs": False}):
        assert mends.mended(unscaled | {"tie_word_embeddings": True})["tie_word_embeddings"] is False
    assert mends.mended({"model_type": "t5", "scale_decoder_outputs": True, "tie_word_embeddings": True})["tie_word_embeddings"]


FUSING = 'import os, sys, time; print(\'{"note": "fusing"}\', flush=True); '


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (FUSING + "time.sleep(600)", "it was ended after its limit of 1 s while "),
        (FUSING + "os.kill(os.getpid(), 9)", "signal 9, which Linux does when memory runs out while fusing"),
        (FUSING + "sys.exit('oops')", "exit status 1 while fusing; its last words: oops"),
        ('print(\'{"error": "KeyError: lost"}\')', "KeyError: lost"),
    ],
)
def test_an_export_that_does_not_end_well_says_so_in_one_line(script: str, told: str) -> None:
    found = run_build(
        "Optimum", "graphs", [sys.executable, "-c", script], os.environ, Progress(), 1.0 if "sleep" in script else 60.0
    )
    assert told in str(found) and "\n" not in str(found)


def test_what_an_export_does_is_passed_on() -> None:
    notes: list[str] = []
    progress = Progress()
    progress.note = notes.append  # type: ignore[method-assign]
    said = 'print(\'{"note": "loading"}\'); print(\'noise\'); print(\'{"graphs": ["model.onnx"]}\')'
    assert run_build("Optimum", "graphs", [sys.executable, "-c", said], os.environ, progress, 60.0) is None
    assert notes == ["Optimum: loading"]


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))
def test_an_encoder_decoder_computes_writes_and_ends_as_pytorch(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForSeq2SeqLM

    from featherweight.runtimes.generation_settings import GenerationSettings
    from featherweight.runtimes.interface import Limits
    from tasks.compile import compile
    from tests.support.families import family_checkpoint, write_words

    checkpoint, text, out = family_checkpoint("t5", tmp_path / "checkpoint"), write_words(tmp_path / "text"), tmp_path / "out"
    settings = json.loads((checkpoint / "generation_config.json").read_text()) | {"repetition_penalty": 1.3}
    (checkpoint / "generation_config.json").write_text(json.dumps(settings))
    out.mkdir()
    metrics = compile(spec(optimize="O3", max_tokens=48), checkpoint=checkpoint, calibration=text, out=out)
    assert metrics["parity_max_abs"] < 1e-3
    engine = OPTIMUM.loaded_model()(out, Serving.read(out), Limits(1, 48, 4))
    asked = GenerationSettings.read(out)
    model, prompts = AutoModelForSeq2SeqLM.from_pretrained(checkpoint).eval(), [[9, 8, 7, 6], [12, 5, 9, 2, 20]]
    for prompt, found in zip(prompts, engine.answer(prompts, 12, asked.values), strict=True):
        ids = torch.tensor([prompt])
        theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12)[0, 1:].tolist()
        ends = theirs.index(2) if 2 in theirs else len(theirs)
        assert found == theirs[: ends + 1]


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))
def test_rounded_weights_are_served_as_they_are_by_every_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One export, of which three sets of graphs are made; each keeps the exact bound with activations in float, and its own."""
    from tasks.compile import compile
    from tests.support.families import family_checkpoint, write_pairs

    monkeypatch.setattr(parity, "open_worker", InProcess)
    exported, build = tmp_path / "exported", write.build_graphs

    def once(checkpoint: Path, out: Path, *others: Any, **keys: Any) -> None:
        if not exported.exists():
            build(checkpoint, exported, *others, **keys)
        shutil.copytree(exported, out)

    monkeypatch.setattr(write, "build_graphs", once)
    checkpoint = family_checkpoint("t5", tmp_path / "checkpoint", initializer_factor=1.0)
    text = write_pairs(tmp_path / "text")
    for activations in ("blocks", "dynamic", "static"):
        out = tmp_path / activations
        out.mkdir()
        wanted = spec(precision="int8", activations=activations, max_tokens=48)
        metrics = compile(wanted, checkpoint=checkpoint, calibration=text, out=out)
        assert metrics["parity_weights_max_abs"] < 1e-4, activations
        assert 0 < metrics["parity_mean_abs"] < metrics["parity_bound"], activations
        assert Serving.read(out).grid == "int8" and "laid out for" in str(OPTIMUM.served_note(Serving.read(out)))


@pytest.mark.parametrize(
    ("kind", "architecture", "changes", "served"),
    [
        ("qwen3", "Qwen3Model", {}, True),
        ("bert", "BertModel", {}, True),
        ("qwen3", "Qwen3Model", {"is_causal": False}, False),
        ("gemma3_text", "Gemma3TextModel", {}, False),
        ("qwen3", "Qwen3ForSequenceClassification", {}, False),
    ],
)
def test_vectors_by_decoders_are_those_of_the_types_that_were_tried(
    kind: str, architecture: str, changes: dict[str, Any], served: bool
) -> None:
    embedding = {"sentence_embedding": {"pooling": ["lasttoken"]}} if architecture.endswith("Model") else {}
    config = AutoConfig.for_model(kind, architectures=[architecture], **embedding, **changes)
    refused = known.vectors_refusal(config)
    assert refused is None if served else "with encoders alone here" in str(refused)


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_vectors_by_a_decoder_are_pytorchs(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_parity, "open_worker", InProcess)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16, "num_key_value_heads": 1}
    source = sentence_files(head_checkpoint("qwen3", "feature-extraction", tmp_path / "source", **shape))
    checkpoint = loaded(source, tmp_path / "checkpoint", "feature-extraction")
    out, asked = tmp_path / "out", spec(optimize=None, precision=precision, max_tokens=24)
    out.mkdir()
    metrics = write_served(asked, checkpoint=checkpoint, calibration=write_pairs(tmp_path / "text"), out=out)
    assert metrics["parity_mean_abs"] < metrics["parity_bound"]
    bound = 1e-4 if precision == "float32" else 0.1
    assert (opened_vectors(out) - opened_vectors(checkpoint)).abs().max() < bound
