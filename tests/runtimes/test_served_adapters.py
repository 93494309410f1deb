"""Adapters beside one model, served: each answers on its engine as transformers and peft do, or is refused."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight.checkpoint.kept_adapters import adapted, kept_adapters
from featherweight.checkpoint.spec import LoadSpec
from featherweight.errors import DataError, ParityError, RecipeError
from featherweight.registry import served_engine
from featherweight.registry.generator import Generator
from featherweight.runtimes import parity
from featherweight.runtimes.parity import load_reference
from featherweight.runtimes.spec import ExportSpec
from featherweight.runtimes.writing import write_served
from featherweight.store.served_folder import Serving
from tasks.load import load
from tests.support.families import family_checkpoint, lora_folder, write_pairs
from tests.support.in_process import InProcess

PROMPTS = ["once upon a time", "the little fox ran by the river"]
needs_llama_cpp = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
IN_PROCESS = ("llama.cpp", "float32"), ("llama.cpp", "int8"), ("torch", "float32")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose keys llama.cpp orders otherwise, with two adapters, one of them scaled by the root of its rank."""
    place = tmp_path_factory.mktemp("adapters")
    base = family_checkpoint("llama", place / "base", intermediate_size=64)
    german: dict[str, Any] = {"seed": 2, "use_rslora": True, "rank_pattern": {"v_proj": 2}}
    adapters = {"fr": str(lora_folder(base, place / "fr")), "de": str(lora_folder(base, place / "de", **german))}
    out = place / "loaded"
    out.mkdir()
    load(LoadSpec(source=str(base), adapters=adapters), out=out)
    return out


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "text")


def export(engine: str, precision: str, **keys: Any) -> Any:
    key = "precision" if engine == "llama.cpp" else "compute_type"
    return ExportSpec.of(engine=engine, max_tokens=64, **{key: precision}, **keys)


def written(folder: Path, adapter: str | None) -> list[str]:
    """Greedy, by transformers' generate, with peft's layers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = load_reference(folder)

    def texts() -> list[str]:
        found = []
        for prompt in PROMPTS:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            ids = ids[:, :-1] if ids[0, -1] == tokenizer.eos_token_id else ids
            made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)[0]
            found.append(str(tokenizer.decode(made[ids.shape[1] :], skip_special_tokens=True)).strip())
        return found

    if adapter is None:
        return texts()
    with adapted(model, kept_adapters(folder)[adapter]):
        return texts()


@needs_llama_cpp
@pytest.mark.engine
@pytest.mark.parametrize(("engine", "precision"), IN_PROCESS)
def test_each_adapter_answers_as_transformers_and_peft_do(
    engine: str, precision: str, checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "open_worker", InProcess)
    monkeypatch.setattr(served_engine, "open_worker", InProcess)
    out = tmp_path / "out"
    out.mkdir()
    metrics = write_served(export(engine, precision), checkpoint=checkpoint, calibration=text, out=out)
    assert metrics["parity_adapters_max_abs"] < (5e-5 if precision == "float32" else 0.33)
    assert sorted(kept_adapters(out)) == ["de", "fr"]
    generator = Generator(out)
    try:
        answers = {name: generator(PROMPTS, max_new_tokens=8, adapter=name) for name in ("fr", None, "de", "fr")}
        with pytest.raises(DataError, match="no adapter 'es' is served beside this model; it has de, fr"):
            generator(PROMPTS, adapter="es")
    finally:
        generator.close()
    if precision == "float32":
        assert {name: [one.strip() for one in found] for name, found in answers.items()} == {
            name: written(checkpoint, name) for name in answers
        }
    assert len({tuple(found) for found in answers.values()}) == 3, "each writes its own"


@needs_llama_cpp
@pytest.mark.engine
def test_an_engine_that_ignores_an_adapter_fails_its_variant(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "open_worker", InProcess)
    monkeypatch.setattr(InProcess, "adapt", lambda self, name: None)
    with pytest.raises(ParityError, match=r"llama\.cpp \(float\) with adapter de does not compute what its PyTorch source"):
        write_served(export("llama.cpp", "float32"), checkpoint=checkpoint, calibration=text, out=tmp_path)


def test_other_engines_refuse_before_they_write(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"checkpoint\.adapters \+ ctranslate2: it serves one model, with no adapters beside it"):
        write_served(ExportSpec.of(engine="ctranslate2"), checkpoint=checkpoint, calibration=text, out=tmp_path)


def test_a_model_without_adapters_says_that_it_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served_engine, "open_worker", InProcess)
    Serving("torch").write(family_checkpoint("llama", tmp_path))
    with pytest.raises(DataError, match="no adapter 'fr' is served beside this model; it has none"):
        Generator(tmp_path)(PROMPTS, adapter="fr")
