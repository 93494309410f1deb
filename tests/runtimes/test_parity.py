"""Parity: what is right passes, and what is silently wrong does not."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from featherweight.errors import ParityError
from featherweight.runtimes.bounds import BRAIN, EXACT, HALF, INT8_ACTIVATIONS, SATURATING, Bound
from featherweight.runtimes.ctranslate2 import patches, runtime
from featherweight.runtimes.packing import QuantizedRows
from featherweight.runtimes.parity import (
    Reference,
    bound_of,
    load_reference,
)
from featherweight.store.served_folder import Serving
from featherweight.text.tokens import Window
from tasks.compile import compile
from tasks.export import export
from tests.conftest import STORY, _tokenizer
from tests.support import serving_models as models
from tests.support.serving_models import serving_spec


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_text(tmp_path_factory.mktemp("text"), STORY)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.make("pruned", tmp_path_factory.mktemp("models") / "pruned", _tokenizer())


@pytest.fixture(scope="module")
def served(pruned: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pruned model in CTranslate2, float32."""
    out = tmp_path_factory.mktemp("served")
    export(serving_spec(engine="ctranslate2"), checkpoint=pruned, calibration=text, out=out)
    return out


@pytest.mark.engine
def test_a_faithful_export_is_within_the_exact_bound(pruned, served, text):
    metrics = Reference.of(load_reference(pruned), pruned, text).check(served)
    assert metrics["parity_max_abs"] <= 1e-5
    assert metrics["parity_mean_abs"] <= metrics["parity_max_abs"]
    assert metrics["parity_bound"] == EXACT.value


@pytest.mark.engine
def test_other_weights_are_told_with_the_numbers(served, text, tmp_path):
    other = models.make("pruned", tmp_path / "other", _tokenizer(), rms_norm_eps=0.1)
    reference = Reference.of(load_reference(other), other, text)
    with pytest.raises(ParityError, match=r"ctranslate2 \(float\).*max \|difference\|.*nats over \d+ tokens, bound 0\.001"):
        reference.check(served)


@pytest.mark.engine
def test_what_is_not_a_number_is_above_any_bound(pruned, served, text):
    reference = Reference.of(load_reference(pruned), pruned, text)
    reference.logprobs[2][5] = math.nan
    with pytest.raises(ParityError):
        reference.check(served, Bound("max", math.inf))


def test_windows_stay_within_the_models_context(tmp_path, text):
    short = models.make("llama", tmp_path / "short", _tokenizer(), max_position_embeddings=32)
    reference = Reference.of(load_reference(short), short, text)
    assert {len(window.ids) for window in reference.windows} == {32}
    assert [len(row) for row in reference.logprobs] == [31] * len(reference.windows)


@pytest.mark.engine
@pytest.mark.parametrize("compute_type", ["float32", "int8"])
def test_pruned_heads_without_their_width_fail(compute_type, text, tmp_path, monkeypatch):
    narrow = models.make("narrow", tmp_path / "narrow", _tokenizer())
    monkeypatch.setattr(patches, "give_head_dim", lambda spec, model: None)
    spec = serving_spec(engine="ctranslate2", compute_type=compute_type)
    with pytest.raises(ParityError, match="ctranslate2"):
        export(spec, checkpoint=narrow, calibration=text, out=tmp_path)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("stage", "spec"),
    [(compile, serving_spec(engine="onnxruntime-genai", precision="int4")),
     (compile, serving_spec(engine="onnxruntime-genai", precision="int8")),
     (export, serving_spec(engine="ctranslate2", compute_type="int8")),
     (export, serving_spec(engine="ctranslate2", compute_type="int8_float32"))],
    ids=["genai-int4", "genai-int8", "ctranslate2-int8", "ctranslate2-int8_float32"],
)  # fmt: skip
def test_one_row_with_a_doubled_scale_fails(stage, spec, pruned, text, tmp_path, monkeypatch):
    gather = QuantizedRows._gather

    def doubled(*arguments):
        q, scales = gather(*arguments)
        if q.shape == (72, 88):
            scales[3] *= 2
        return q, scales

    monkeypatch.setattr(QuantizedRows, "_gather", doubled)
    with pytest.raises(ParityError, match=r"bound 0\.001"):
        stage(spec, checkpoint=pruned, calibration=text, out=tmp_path)


def test_bounds_follow_what_the_engine_does_with_activations(monkeypatch):
    int8 = {"compute_type": "int8"}
    assert bound_of(Serving("onnxruntime-genai")) == EXACT
    assert bound_of(Serving("onnxruntime-genai", grid="int4-g32")) == INT8_ACTIVATIONS
    assert bound_of(Serving("onnxruntime-genai", grid="int4-g32", options={"activations": "float32"})) == EXACT
    assert bound_of(Serving("ctranslate2", options={"compute_type": "float32"}, grid="int8")) == EXACT
    assert bound_of(Serving("vllm", grid="int8")) == INT8_ACTIVATIONS
    assert bound_of(Serving("ctranslate2", options={"compute_type": "int8_float16"}, grid="int8")) == INT8_ACTIVATIONS
    assert bound_of(Serving("vllm")) == bound_of(Serving("torch-compile")) == EXACT
    for name, sixteen in {"float16": HALF, "bfloat16": BRAIN}.items():
        assert bound_of(Serving("torch", options={"dtype": name})) == bound_of(Serving("vllm", options={"dtype": name})) == sixteen
        assert bound_of(Serving("ctranslate2", options={"compute_type": name, "device": "cuda"})) == sixteen
    for features, bound in ((frozenset({"avx2"}), SATURATING), (frozenset({"avx2", "avx_vnni"}), INT8_ACTIVATIONS)):
        monkeypatch.setattr(runtime, "cpu_features", lambda features=features: features)
        assert bound_of(Serving("ctranslate2", options=int8, grid="int8")) == bound
        assert bound_of(Serving("ctranslate2", options=int8, grid="int8-reduced")) == INT8_ACTIVATIONS


def test_a_stretch_that_is_off_is_not_called_right():
    """By the mean over whole windows all was right up to their very end, which was refused."""
    window, positions = Window(list(range(128)), 128), list(range(127))
    reference = Reference([window], [[0.0] * 127], [positions], [0, 64])
    found = [[0.05 if position < 64 else 0.2 for position in positions]]
    with pytest.raises(ParityError, match=r"from token 64 on: .*; it is right up to 64 tokens"):
        reference.hold(found, Bound("mean", 0.15), "engine")
    with pytest.raises(ParityError, match=r"up to 128$"):
        reference.hold([[0.2 if position < 64 else 0.05 for position in positions]], Bound("mean", 0.15), "engine")
