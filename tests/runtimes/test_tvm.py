"""Apache TVM: what is refused before anything is compiled, and that what it compiles answers as PyTorch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from featherweight.errors import StageError, ToolchainError
from featherweight.grid import GRIDS
from featherweight.model.facts import CheckpointFacts
from featherweight.runtimes import code_levels, doctor
from featherweight.runtimes.candidate import Candidate
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.interface import Grids
from featherweight.store.served_folder import Serving
from featherweight.system import toolchains
from featherweight.system.device import CPU
from featherweight.system.machine import Machine, describe
from tests.support.compiling import LABELS, check_labels, check_texts, compiled, configuration
from tests.support.serving_models import serving_spec

TVM = RUNTIMES["tvm"]
ABSENT = TVM.unwritable()
AVX2 = Machine("Linux", "x86_64", "some", frozenset({"avx2", "fma"}), 2, 2, 2**33, ())
AVX512 = Machine(**vars(AVX2) | {"cpu_features": AVX2.cpu_features | {"avx512f", "avx512bw", "avx512vl"}})


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"model_type": "llama"}, None),
        ({"model_type": "bert"}, None),
        ({"model_type": "bloom"}, "were tried with llama, mistral, .* not with bloom; take another engine"),
        ({"model_type": "mistral", "sliding_window": 32}, "no sliding window, mistral's is of 32 tokens, and 64 are to be served"),
        ({"model_type": "mistral", "sliding_window": 64}, None),
        ({"model_type": "gemma", "attn_logit_softcapping": 50.0}, "caps no logits, as this gemma does"),
        (
            {"model_type": "llama", "rope_parameters": {"rope_type": "dynamic"}},
            r"depend on the length \(dynamic\); take another engine",
        ),
    ],
)
def test_models_that_it_does_not_compute_are_refused(told: dict[str, Any], reason: str | None) -> None:
    import re

    candidate = Candidate(CheckpointFacts(configuration(**told)), 64)
    found = TVM.model_refusal(serving_spec(engine="tvm"), candidate)
    assert (found is None) if reason is None else re.search(reason, str(found))


@pytest.mark.parametrize(
    ("precision", "grids", "reason"),
    [
        ("float32", Grids(), None),
        ("float32", Grids(GRIDS["int8"]), "would store rounded weights at full size"),
        ("int8", Grids(), None),
        ("int8", Grids(GRIDS["int8"], GRIDS["int8"]), None),
        ("int8", Grids(GRIDS["int8-g32"]), "one scale per row, not int8-g32; take another engine"),
        ("int8", Grids(GRIDS["int8"], None, GRIDS["int4-g32"]), "not int4-g32"),
        ("int8", Grids(GRIDS["fp8"]), "hold 8-bit integers"),
    ],
)
def test_it_holds_floats_and_8_bits_of_one_scale_per_row(precision: str, grids: Grids, reason: str | None) -> None:
    found = TVM.grid_refusal(grids, serving_spec(engine="tvm", precision=precision))
    assert (found is None) if reason is None else reason in str(found)


def test_it_serves_decoders_and_encoders_from_cpus() -> None:
    spec = serving_spec(engine="tvm")
    assert "not of both in one" in str(TVM.task_refusal("text2text-generation"))
    assert TVM.task_refusal("text-generation") is None and TVM.task_refusal("fill-mask") is None
    assert "serves from the CPU alone" in str(TVM.device_refusal(spec, "cuda", describe()))
    assert [offer.grid for offer in TVM.offers(CPU, AVX2)] == [None, "int8"]


def test_code_is_made_for_what_the_cpu_has_and_is_not_loaded_where_that_is_missing() -> None:
    assert [code_levels.level(one) for one in (AVX2, AVX512)] == ["x86-64-v3", "x86-64-v4"]
    assert code_levels.level(Machine(**vars(AVX2) | {"cpu_features": frozenset()})) == "generic"
    code_levels.require("x86-64-v3", AVX512)
    with pytest.raises(StageError, match="compiled for x86-64-v4, and the CPU here has no avx512bw; optimize"):
        code_levels.require("x86-64-v4", AVX2)


def test_without_its_toolchain_the_doctor_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATHERWEIGHT_TOOLCHAINS", str(tmp_path))
    assert "run `featherweight doctor --install tvm`" in str(TVM.missing())
    checks = {check.name: check for check in [*doctor._engines(describe()), *doctor._toolchains()]}
    assert checks["engine tvm"].state == "missing"
    assert checks["toolchain tvm"].remedy == "run `featherweight doctor --install tvm`"


def test_without_a_compiler_it_serves_and_does_not_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(TVM), "missing", lambda _: None)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "needs a C++ compiler, and there is no no-such-compiler" in str(TVM.unwritable())


def test_a_toolchain_of_this_python_is_joined_behind_our_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATHERWEIGHT_TOOLCHAINS", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    python = toolchains.interpreter(tmp_path / "tvm")
    python.parent.mkdir(parents=True)
    python.touch()
    (tmp_path / "tvm" / "lib" / "python2.7" / "site-packages").mkdir(parents=True)
    with pytest.raises(ToolchainError, match="made with another Python than python3"):
        toolchains.join("tvm")
    packages = tmp_path / "tvm" / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    packages.mkdir(parents=True)
    toolchains.join("tvm")
    toolchains.join("tvm")
    assert sys.path[-1] == str(packages) and sys.path.count(str(packages)) == 1


def test_what_it_reads_is_what_lies_in_its_file(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"model.embed.weight": torch.zeros(10, 4), "model.up.weight": torch.zeros(1, 4, 16)}, tmp_path / "p.safetensors")
    (tmp_path / "manifest.json").write_text(json.dumps({"tables": ["model.embed.weight"]}))
    held = {one.role: (one.size_bytes, one.rows) for one in TVM.held_tensors(tmp_path, Serving("tvm"), configuration())}
    assert held == {"row": (160, 10), "step": (256, 1)}


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))
def test_a_decoder_writes_as_pytorch_across_the_parts_of_its_cache(tmp_path: Path) -> None:
    """Grouped heads of 8 channels, prompts of two lengths in one call, and texts that cross 64 places."""
    checkpoint, engine = compiled(serving_spec(engine="tvm", max_tokens=96), "llama", tmp_path)
    files = {path.name for path in (tmp_path / "out" / "tvm").iterdir()}
    assert files == {"model.so", "parameters.safetensors", "manifest.json"}
    check_texts(checkpoint, engine, [[9, 8, 7] * 20, [12, 5, 9] * 20, [4, 5]])


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))
def test_an_encoder_answers_each_text_as_if_it_were_alone(tmp_path: Path) -> None:
    check_labels(*compiled(serving_spec(engine="tvm", max_tokens=96), "bert", tmp_path, **LABELS))


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))
def test_integers_are_computed_with_as_the_floats_that_they_stand_for(tmp_path: Path) -> None:
    """A tied head as well; `compiled` holds it to PyTorch with the rounded weights."""
    from safetensors.torch import load_file

    compiled(serving_spec(engine="tvm", precision="int8", max_tokens=96), "llama", tmp_path, tie_word_embeddings=True)
    out = tmp_path / "out"
    kinds = {str(one.dtype) for one in load_file(out / "tvm" / "parameters.safetensors").values() if one.ndim == 3}
    assert Serving.read(out).grid == "int8" and kinds == {"torch.int8"}
