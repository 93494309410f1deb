"""llama.cpp: vectors and labels that decoders make of texts are PyTorch's, whatever makes a text's vector of its tokens'."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from featherweight.model.facts import CheckpointFacts
from featherweight.model.heads import Dense, SentenceEmbedding
from featherweight.runtimes import answer_parity
from featherweight.runtimes.candidate import Candidate
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.llama_cpp.answers import pooling
from featherweight.runtimes.llama_cpp.refusals import speculation_refusal
from featherweight.runtimes.spec import ExportSpec
from featherweight.runtimes.writing import write_served
from featherweight.spec import Task
from tests.support.families import write_pairs
from tests.support.heads import head_checkpoint, loaded, opened_vectors, sentence_files
from tests.support.in_process import InProcess

served = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
LAST = {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}
BOTH = {"pooling_mode_weightedmean_tokens": True, "pooling_mode_cls_token": True}
SHAPE = {
    "intermediate_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 16,
    "num_key_value_heads": 1,
}


def spec(**keys: Any) -> Any:
    return ExportSpec.of(engine="llama.cpp", max_tokens=48, **keys)


@served
@pytest.mark.engine
@pytest.mark.parametrize(
    ("kind", "task", "precision", "files"),
    [
        ("qwen3", "feature-extraction", "float32", LAST),
        ("mistral", "feature-extraction", "int8", {}),
        ("gemma", "feature-extraction", "float32", BOTH),
        ("qwen2", "text-classification", "float32", {}),
        ("llama", "text-classification", "q4_k", {}),
        ("llama", "token-classification", "float16", {}),
    ],
)
def test_decoders_answer_as_pytorch_does(
    kind: str, task: Task, precision: str, files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer_parity, "open_worker", InProcess)
    shape = {name: size for name, size in SHAPE.items() if (kind, name) != ("qwen2", "head_dim")}
    source = head_checkpoint(kind, task, tmp_path / "source", **shape)
    if task == "feature-extraction":
        sentence_files(source, **files)
    checkpoint = loaded(source, tmp_path / "checkpoint", task)
    out = tmp_path / "out"
    out.mkdir()
    metrics = write_served(spec(precision=precision), checkpoint=checkpoint, calibration=write_pairs(tmp_path / "text"), out=out)
    assert metrics["parity_mean_abs"] < metrics["parity_bound"]
    assert ("parity_weights_max_abs" in metrics) == (precision in ("int8", "q4_k"))
    if precision == "float32" and task == "feature-extraction":
        assert (opened_vectors(out) - opened_vectors(checkpoint)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        ("qwen3", {"is_causal": False}, "and this model all of a text"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention None alone"),
        ("olmo2", {}, "wants a head of its own, and a model for feature-extraction has none"),
        ("bert", {}, "no GGUF file is written here for bert models"),
    ],
)
def test_what_it_would_read_otherwise_is_refused(kind: str, changes: dict[str, Any], told: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind, architectures=["Model"], sentence_embedding={"pooling": ["mean"]}, **changes)
    assert told in str(RUNTIMES["llama.cpp"].model_refusal(spec(), Candidate(CheckpointFacts(config), 48)))
    assert RUNTIMES["llama.cpp"].task_refusal("feature-extraction") is None
    assert "decoders only" in str(RUNTIMES["llama.cpp"].task_refusal("fill-mask"))


def test_nothing_is_drafted_for_vectors_and_the_file_says_how_they_are_made() -> None:
    from transformers import AutoConfig

    embedding = SentenceEmbedding(pooling=("lasttoken",)).settings()
    config = AutoConfig.for_model("qwen3", architectures=["Qwen3Model"], **embedding)
    assert "writes no text that could be drafted" in str(speculation_refusal(config))
    assert pooling(config) == "LAST"
    for others in (SentenceEmbedding(("mean", "max")), SentenceEmbedding(dense=(Dense("2_Dense"),))):
        assert pooling(AutoConfig.for_model("qwen3", architectures=["Qwen3Model"], **others.settings())) is None
    assert pooling(AutoConfig.for_model("llama", architectures=["LlamaForSequenceClassification"])) is None
