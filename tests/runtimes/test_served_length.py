"""What is served is verified to its full length, round the model's edges, in scoring and in generation; more is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from featherweight.errors import DataError, FeatherweightError, ParityError, RecipeError, StageError
from featherweight.model.positions import edges, rotary_kinds, rotary_switch, sliding_window
from featherweight.recipe.plan import expand
from featherweight.recipe.recipe import Recipe
from featherweight.registry import served_engine
from featherweight.registry.generator import Generator
from featherweight.runtimes import parity
from featherweight.runtimes.bounds import INT8_ACTIVATIONS, Bound
from featherweight.runtimes.client import open_worker
from featherweight.runtimes.interface import Generation, Tokens
from featherweight.runtimes.parity import Reference, load_reference
from featherweight.runtimes.torch.eager import TorchModel
from featherweight.runtimes.writing import write_served
from featherweight.store.served_folder import Serving
from tests.conftest import STORY, _tokenizer
from tests.support import serving_models as models
from tests.support.in_process import InProcess
from tests.support.serving_models import serving_spec

TOKENS = 200
WINDOW = 100
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
CHANGES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("pruned", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "llama3": ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": WINDOW, "rope_theta": 10000.0}}),
    "yarn": ("qwen2", {"rope_parameters": YARN}),
    "dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}}),
    "longrope": ("phi3", {}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}}),
}  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_text(tmp_path_factory.mktemp("text"), STORY)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    kinds = {name: models.make(family, root / name, _tokenizer(), **changes) for name, (family, changes) in CHANGES.items()}
    return kinds | {"llama": models.make("llama", root / "llama", _tokenizer())}


@pytest.fixture(autouse=True)
def _in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "open_worker", InProcess)


def write(engine: str, checkpoint: Path, text: Path, out: Path, tokens: int = TOKENS, **keys: Any) -> dict[str, float]:
    out.mkdir(exist_ok=True)
    spec = serving_spec(engine, max_tokens=tokens, **keys)
    return dict(write_served(spec, checkpoint=checkpoint, calibration=text, out=out))


def test_windows_and_prompts_reach_the_served_length_and_cross_the_edges(checkpoints: dict[str, Path], text: Path) -> None:
    reference = Reference.of(load_reference(checkpoints["mistral"]), checkpoints["mistral"], text, TOKENS)
    assert [len(window.ids) for window in reference.windows] == [TOKENS, WINDOW, WINDOW + 1, WINDOW + 2, *[128] * 5]
    assert [(len(one.prompt), len(one.tokens)) for one in reference.continuations] == [(TOKENS - 16, 16), (WINDOW - 8, 16)]
    assert reference.cuts == [0, 50, 100, 150]
    assert reference.longest == TOKENS


def test_edges_stand_anywhere_in_a_configuration() -> None:
    from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config

    assert edges(MistralConfig(sliding_window=4096)) == [4096]
    assert edges(MistralConfig(sliding_window=None)) == edges(Qwen2Config(sliding_window=32, use_sliding_window=False)) == []
    scaled = LLAMA3 | {"original_max_position_embeddings": 8192, "rope_theta": 5e5}
    assert edges(LlamaConfig(rope_parameters=scaled)) == [8192]
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e6}
    two = {"full_attention": yarn, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    gemma = Gemma3TextConfig(sliding_window=160, rope_parameters=two)
    assert edges(gemma) == [64, 160]
    assert rotary_kinds(gemma) == {"yarn", "default"}
    assert sliding_window(gemma) == 160
    phi = Phi3Config(**models.FAMILIES["phi3"][1])
    assert (edges(phi), rotary_switch(phi), sliding_window(phi)) == ([100], 100, None)


class LateFault(TorchModel):
    """Right up to 160 tokens, half a nat off from there on."""

    def logprobs(self, windows: Tokens) -> list[list[float]]:
        return [[score - 0.5 * (place >= 159) for place, score in enumerate(row)] for row in super().logprobs(windows)]


class FaultyCache(TorchModel):
    """Scores rightly, and repeats its prompt's last token instead of writing."""

    def generate(self, prompts: Tokens, new_tokens: int) -> Generation:
        return Generation([prompt[-1:] * new_tokens for prompt in prompts], super().generate(prompts, new_tokens).timing)


def test_a_fault_that_sets_in_late_is_not_averaged_away(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("torch", checkpoints["llama"], text, tmp_path)
    Serving("torch").write(tmp_path)
    reference = Reference.of(load_reference(checkpoints["llama"]), checkpoints["llama"], text, TOKENS)
    monkeypatch.setattr(InProcess, "loaded", LateFault)
    faulty = InProcess(tmp_path).score(reference.windows)
    differences = [abs(a - b) for x, y in zip(reference.logprobs, faulty, strict=True) for a, b in zip(x, y, strict=True)]
    assert sum(differences) / len(differences) < INT8_ACTIVATIONS.value / 2
    with pytest.raises(ParityError, match=r"what its PyTorch source computes from token 150 on: mean .* nats over \d+ tokens"):
        reference.check(tmp_path, INT8_ACTIVATIONS)


def test_text_that_pytorch_would_not_write_is_told(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("torch", checkpoints["llama"], text, tmp_path)
    Serving("torch").write(tmp_path)
    reference = Reference.of(load_reference(checkpoints["llama"]), checkpoints["llama"], text, TOKENS)
    reference.check(tmp_path)
    monkeypatch.setattr(InProcess, "loaded", FaultyCache)
    with pytest.raises(ParityError, match=rf"does not write what .* after {TOKENS - 16} tokens: .* by max .* nats, bound 0\.002"):
        reference.check(tmp_path)
    reference.check(tmp_path, Bound("max", 1e3))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ctranslate2", "onnxruntime-genai", "torch"])
@pytest.mark.parametrize("kind", [*CHANGES])
def test_served_exactly_or_refused_with_the_number_of_tokens(
    kind: str, engine: str, checkpoints: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    """No engine's own refusal, crash or silent difference is anything else."""
    try:
        metrics = write(engine, checkpoints[kind], text, tmp_path / "out")
    except FeatherweightError as error:
        assert engine != "torch"
        assert "\n" not in str(error)
        told = ("cannot take this", str(TOKENS))  # by what it is made of, or by the length
        assert any(reason in str(error) for reason in told)
        return
    served = Serving.read(tmp_path / "out")
    assert served.max_tokens == TOKENS
    reference = Reference.of(load_reference(checkpoints[kind]), checkpoints[kind], text, TOKENS)
    again = reference.check(tmp_path / "out", Bound("max", 1e-3))
    assert max(metrics.get("parity_max_abs", 0.0), again["parity_max_abs"]) < 1e-3


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_ctranslate2_serves_a_sliding_window_up_to_it(kind: str, checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=rf"window of {WINDOW} tokens.*max_tokens {WINDOW}.*torch") as refused:
        write("ctranslate2", checkpoints[kind], text, tmp_path / "long")
    assert str(TOKENS) in str(refused.value)
    assert write("ctranslate2", checkpoints[kind], text, tmp_path / "short", WINDOW)["parity_max_abs"] < 1e-4
    assert Serving.read(tmp_path / "short").max_tokens == WINDOW


def test_the_report_tells_of_context_that_is_not_served(checkpoints: dict[str, Path], text: Path, tmp_path: Path) -> None:
    write("torch", checkpoints["llama"], text, tmp_path)
    assert (
        Serving.read(tmp_path).length_note
        == f"verified and served up to {TOKENS} tokens of a context of 256; workload.max_tokens raises it"
    )
    write("torch", checkpoints["llama"], text, tmp_path / "whole", tokens=512)
    assert Serving.read(tmp_path / "whole").max_tokens == 256
    assert Serving.read(tmp_path / "whole").length_note is None


def test_more_than_was_verified_is_refused_in_one_line(
    checkpoints: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("torch", checkpoints["llama"], text, tmp_path, tokens=64)
    with pytest.raises(StageError, match="65 tokens are asked of torch, and this model was verified up to 64 only"):
        open_worker(tmp_path, threads=1, max_tokens=65)
    with pytest.raises(StageError, match=r"512 tokens .* up to 64 only"):
        Generator(tmp_path, max_tokens=512)
    monkeypatch.setattr(served_engine, "open_worker", InProcess)
    served = Generator(tmp_path)
    assert served(["Once"], 4)
    with pytest.raises(DataError, match="room for 64 tokens"):
        served(["Once " * 70], 4)
    told = json.loads((tmp_path / "serving.json").read_text())
    del told["max_tokens"]
    (tmp_path / "serving.json").write_text(json.dumps(told))
    assert Generator(tmp_path).max_tokens == 512


@pytest.mark.parametrize(
    ("workload", "own", "tokens"),
    [({}, {}, 512),
     ({"window_tokens": 1024}, {}, 1024),
     ({"max_tokens": 4096}, {}, 4096),
     ({"max_tokens": 128, "window_tokens": 64}, {}, 128),
     ({"prompt_tokens": 500, "new_tokens": 500}, {}, 1000),
     ({}, {"max_tokens": 2048}, 2048),
     ({}, {"max_tokens": 300}, 300),
     ({"window_tokens": 400}, {"max_tokens": 300}, 400)],
)  # fmt: skip
def test_the_plan_tells_engines_how_long_they_serve(workload: dict[str, int], own: dict[str, int], tokens: int) -> None:
    told = {
        "name": "r", "checkpoint": {"source": "m"}, "data": {"source": "t"}, "workload": workload, "promote": {"model": "m"},
        "stages": {"export": {"ct2": {"engine": "ctranslate2", **own}}},
    }  # fmt: skip
    plan = expand(Recipe.model_validate(told))
    assert plan.nodes["ct2"].spec.model_dump()["max_tokens"] == tokens
    assert own or plan.nodes["baseline"].spec.model_dump()["max_tokens"] == tokens
