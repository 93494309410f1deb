"""The evaluate stage, on real engines."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from featherweight.checkpoint.saving import copy_tokenizer
from featherweight.checkpoint.tokenizer import load_tokenizer
from featherweight.errors import IntegrityError, RecipeError, StageError
from featherweight.measure.batching import Batching, best_batching
from featherweight.measure.measurement import FILE, Comparison
from featherweight.measure.spec import WorkloadSpec
from featherweight.progress import Progress
from featherweight.runtimes.bytes_read import bytes_read
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.kept_worker import kept_workers
from featherweight.runtimes.llama_cpp.vocabulary import Vocabulary
from featherweight.runtimes.llama_cpp.write import write_file
from featherweight.runtimes.speculation import SpeculationSpec
from featherweight.runtimes.writing import load_reference
from featherweight.store.served_folder import Serving
from featherweight.text.documents import Document, write_documents
from featherweight.text.tokens import token_windows
from tasks.evaluate import evaluate

SPEC = WorkloadSpec(
    prompt_tokens=8,
    new_tokens=24,
    batch_sizes=(1, 2),
    rounds=3,
    windows=6,
    window_tokens=48,
    threads=(1,),
    changed_answers={"prompts": 5, "new_tokens": 6},
)


class Recorder(Progress):
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[tuple[int, int, dict[str, float]]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, done: int, total: int, **values: float) -> None:
        self.steps.append((done, total, values))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    stories = [f"Once upon a time there was a little checkpoint number {i}. It wanted to be light. " * 4 for i in range(4)]
    write_documents(folder, [Document(str(index), story) for index, story in enumerate(stories)])
    return folder


@pytest.fixture(scope="module")
def baseline(tiny_checkpoint, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("baseline") / "torch"
    shutil.copytree(tiny_checkpoint, folder)
    Serving("torch").write(folder)
    return folder


@pytest.fixture(scope="module")
def ctranslate2(tiny_checkpoint, tmp_path_factory) -> Path:
    import ctranslate2

    folder = tmp_path_factory.mktemp("variant")
    ctranslate2.converters.TransformersConverter(str(tiny_checkpoint)).convert(str(folder / "model"), quantization="int8")
    shutil.copy(tiny_checkpoint / "config.json", folder)
    Serving("ctranslate2", "model", {"compute_type": "int8"}).write(folder)
    return folder


@pytest.fixture(scope="module")
def measured(baseline, text, tmp_path_factory) -> Iterator[Path]:
    """The baseline's own evaluation; its worker is kept, as it is in a run."""
    out = tmp_path_factory.mktemp("measured")
    with kept_workers():
        evaluate(SPEC, served=baseline, baseline=baseline, evaluation=text, out=out)
        yield out


@pytest.mark.engine
def test_the_baseline_is_measured_as_pytorch_computes_it(measured, baseline, text):
    import torch
    from transformers import AutoModelForCausalLM

    windows = token_windows(text, load_tokenizer(baseline), 48, 6)
    model = AutoModelForCausalLM.from_pretrained(baseline).eval()
    nll = 0.0
    with torch.no_grad():
        for window in windows:
            ids = torch.tensor([window.ids])
            nll += float(model(ids, labels=ids).loss) * (len(window.ids) - 1)
    comparison = Comparison.read(measured)
    metrics = comparison.metrics()
    assert metrics["bits_per_byte"] == pytest.approx(nll / math.log(2) / sum(w.text_bytes for w in windows), rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(nll / sum(len(w.ids) - 1 for w in windows)), rel=1e-5)
    assert metrics["speedup_1"] == metrics["speedup_2"] == 1.0
    assert metrics["quality_change"] == metrics["quality_change_high"] == 0.0
    assert comparison.baseline == comparison.variant
    tokenizer = load_tokenizer(baseline)
    assert comparison.variant.answers == tuple(
        tokenizer.decode(written[0, 8:])
        for window in token_windows(text, tokenizer, 24, 5)
        for written in [model.generate(torch.tensor([window.ids[:8]]), max_new_tokens=6, do_sample=False)]
    )
    assert metrics["answers"] == 5 and metrics["changed_answers"] == metrics["changed_answers_low"] == 0.0
    assert [path.name for path in measured.iterdir()] == [FILE]


@pytest.mark.engine
def test_a_variant_is_measured_beside_the_baseline_whose_quality_is_not_measured_again(
    measured, baseline, ctranslate2, text, tmp_path
):
    heard = Recorder()
    inputs = {"served": ctranslate2, "baseline": baseline, "evaluation": text, "baseline_measurement": measured}
    metrics = evaluate(SPEC, **inputs, out=tmp_path, progress=heard)
    comparison, before = Comparison.read(tmp_path), Comparison.read(measured).variant
    assert metrics == comparison.metrics() == json.loads((tmp_path / FILE).read_text())["metrics"]
    assert comparison.variant.engine == "ctranslate2" and comparison.baseline.engine == "torch"
    assert comparison.variant.attention == {} and set(before.attention) == {"prompt", "step"} == set(comparison.baseline.attention)
    assert comparison.baseline.quality == before.quality
    assert comparison.baseline.speed(1).total_s != before.speed(1).total_s, "speed is always measured in turns"
    assert sum(note.startswith("scoring") for note in heard.notes) == 1
    assert [note for note in heard.notes if note.endswith("texts")] == ["asking ctranslate2 for 5 texts"]
    changed = sum(ours != theirs for ours, theirs in zip(comparison.variant.answers, before.answers, strict=True))
    assert metrics["changed_answers"] == changed / 5 < metrics["changed_answers_high"]
    assert "starting torch" not in heard.notes, "the baseline's process is the one that was measured by itself"
    assert comparison.baseline.startup_s == before.startup_s and comparison.baseline.peak_memory_bytes == before.peak_memory_bytes
    assert [speed.warmup_s for speed in comparison.baseline.speeds] == [speed.warmup_s for speed in before.speeds]
    assert abs(metrics["quality_change"]) < 0.05 and metrics["quality_change_low"] < metrics["quality_change_high"]
    assert metrics["speedup_1_low"] <= metrics["speedup_1"] <= metrics["speedup_1_high"]
    for batch in (1, 2):
        speed = comparison.variant.speed(batch)
        assert len(speed.total_s) == 3 * speed.repeats and len(speed.rounds_s) == 3
        assert 0 < metrics[f"ttft_s_{batch}"] < metrics[f"p50_latency_s_{batch}"] <= metrics[f"p95_latency_s_{batch}"]
        assert metrics[f"tokens_per_s_{batch}"] == pytest.approx(batch * 24 / metrics[f"p50_latency_s_{batch}"])
    assert metrics["size_bytes"] == sum(path.stat().st_size for path in ctranslate2.rglob("*") if path.is_file())
    assert 1e7 < metrics["peak_memory_bytes"] < before.peak_memory_bytes
    assert metrics["bytes_per_token"] == bytes_read(ctranslate2).per_token(prompt_tokens=8, new_tokens=24)
    share = metrics["tokens_per_s_1"] * metrics["bytes_per_token"] / metrics["bandwidth_bytes_s"]
    assert metrics["roofline_1"] == pytest.approx(share)
    assert [step[:2] for step in heard.steps] == [(1, 3), (2, 3), (3, 3)] * 2
    assert heard.steps[-1][2]["tokens_per_s_2"] > 0


@pytest.mark.engine
def test_other_windows_than_the_baselines_are_scored_anew_and_threads_are_probed(measured, baseline, ctranslate2, text, tmp_path):
    spec = SPEC.model_copy(update={"windows": 3, "batch_sizes": (1,), "rounds": 1, "threads": (1, 2)})
    inputs = {"served": ctranslate2, "baseline": baseline, "evaluation": text, "baseline_measurement": measured}
    heard = Recorder()
    evaluate(spec, **inputs, out=tmp_path, progress=heard)
    comparison = Comparison.read(tmp_path)
    assert "starting torch" in heard.notes, "its memory and its load time are measured anew too"
    assert len(comparison.baseline.quality.nll) == len(comparison.variant.quality.nll) == 3
    for side in (comparison.variant, comparison.baseline):
        probe = side.speed(1).probe
        assert set(probe) == {1, 2} and all(probe.values())
        assert min(probe[side.speed(1).threads]) <= 1.03 * min(min(times) for times in probe.values())


@pytest.mark.engine
def test_an_engine_that_is_slow_to_switch_takes_the_baselines_best_numbers_of_threads(
    measured, baseline, ctranslate2, text, tmp_path, monkeypatch
):
    """By what is timed; none is tried, each of which would cost it tens of seconds."""
    before = Comparison.read(measured)
    first, second = before.variant.speeds
    known = replace(before.variant, speeds=(first, replace(second, threads=2)))
    (tmp_path / "known").mkdir()
    replace(before, variant=known, baseline=known).write(tmp_path / "known")
    monkeypatch.setattr(RUNTIMES["ctranslate2"], "slow_to_switch", True)
    heard, spec = Recorder(), SPEC.model_copy(update={"threads": None, "rounds": 1, "windows": 6})
    inputs = {"served": ctranslate2, "baseline": baseline, "evaluation": text, "baseline_measurement": tmp_path / "known"}
    evaluate(spec, **inputs, out=tmp_path, progress=heard)
    speeds = Comparison.read(tmp_path).variant.speeds
    assert [(speed.batch_size, speed.threads, dict(speed.probe)) for speed in speeds] == [(1, 1, {}), (2, 2, {})]
    assert not [note for note in heard.notes if note.startswith("trying ctranslate2")]


def test_a_workload_that_does_not_fit_the_context_is_refused_before_anything_starts(baseline, text, tmp_path):
    heard, spec = Recorder(), SPEC.model_copy(update={"new_tokens": 250})
    with pytest.raises(RecipeError, match="make 258 tokens, but the model's context holds 256; lower them"):
        evaluate(spec, served=baseline, baseline=baseline, evaluation=text, out=tmp_path, progress=heard)
    spec = WorkloadSpec(**SPEC.model_dump() | {"lengths": [250]})
    with pytest.raises(RecipeError, match=r"workload\.lengths: prompt_tokens 250 .* make 266 tokens, but .* holds 256"):
        evaluate(spec, served=baseline, baseline=baseline, evaluation=text, out=tmp_path, progress=heard)
    assert not heard.notes and not list(tmp_path.iterdir())


@pytest.mark.engine
def test_long_prompts_are_timed_in_turns_too_and_requests_that_come_at_a_rate(baseline, ctranslate2, text, tmp_path):
    requests = {"rate": [50, 100], "seconds": 0.1, "rounds": 2, "patience_s": 600, "max_batch": [1, 2], "batch_window_s": 0.001}
    less = {"windows": 2, "batch_sizes": (1,), "rounds": 2, "lengths": [100], "requests": requests, "changed_answers": None}
    spec = WorkloadSpec(**SPEC.model_dump() | less)
    alone, beside = tmp_path / "alone", tmp_path / "beside"
    for folder in (alone, beside):
        folder.mkdir()
    heard = Recorder()
    evaluate(spec, served=baseline, baseline=baseline, evaluation=text, out=alone, progress=heard)
    tries = [note for note in heard.notes if "at once" in note]
    assert len(tries) == len(set(tries)) > 0, "who is measured beside itself is tried once"
    metrics = evaluate(spec, served=ctranslate2, baseline=baseline, evaluation=text, out=beside, baseline_measurement=alone)
    comparison = Comparison.read(beside)
    for side in (comparison.variant, comparison.baseline):
        (long,) = side.lengths
        assert (long.batch_size, long.prompt_tokens, long.new_tokens, len(long.rounds_ttft_s)) == (1, 100, 16, 2)
        assert [(load.rate, [len(requests) for requests in load.rounds]) for load in side.loads] == [(50, [3, 3]), (100, [5, 5])]
        assert all(one.came_s <= one.first_s <= one.answered_s for load in side.loads for one in load.requests)
    assert metrics["ttft_s_prompt_100"] < metrics["p50_latency_s_prompt_100"] <= metrics["p99_latency_s_prompt_100"]
    assert [one.came_s for one in comparison.variant.loads[1].requests] == [
        one.came_s for one in comparison.baseline.loads[1].requests
    ]
    assert metrics["done_rate_100"] == 1.0 and metrics["p50_latency_s_rate_50"] > 0 and metrics["threads_requests"] == 1
    tries = [load.tried for load in comparison.variant.loads]
    assert tries[0] == tries[1] and {one.batching for one in tries[0]} <= {Batching(1, 0.001), Batching(2, 0.001)}
    assert comparison.variant.loads[0].batching == best_batching(tries[0])
    assert metrics["max_batch_requests"] in (1, 2) and metrics["batch_window_s_requests"] == 0.001
    assert comparison.baseline.loads[0].tried == Comparison.read(alone).variant.loads[0].tried, "known from before"
    assert comparison.baseline.startup_s == Comparison.read(alone).variant.startup_s, "known from before"


@pytest.mark.engine
def test_a_variant_that_computes_no_numbers_fails(measured, baseline, text, tmp_path):
    from safetensors.torch import load_file, save_file

    broken, out = tmp_path / "broken", tmp_path / "out"
    out.mkdir()
    shutil.copytree(baseline, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][:] = math.nan
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    spec = SPEC.model_copy(update={"batch_sizes": (1,), "rounds": 1})
    inputs = {"served": broken, "baseline": baseline, "evaluation": text, "baseline_measurement": measured}
    with pytest.raises(StageError, match="torch gives log-probabilities that are no numbers in 6 of 6 windows"):
        evaluate(spec, **inputs, out=out)
    assert not list(out.iterdir())


def test_what_was_not_served_or_not_measured_is_named(baseline, text, tmp_path):
    with pytest.raises(IntegrityError, match="not a served variant"):
        evaluate(SPEC, served=text, baseline=baseline, evaluation=text, out=tmp_path)
    with pytest.raises(IntegrityError, match=r"measurement\.json is no measurement"):
        evaluate(SPEC, served=baseline, baseline=baseline, evaluation=text, out=tmp_path, baseline_measurement=text)


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
def test_a_variant_with_speculation_is_measured_beside_itself_without(tiny_checkpoint, baseline, text, tmp_path):
    served, out = tmp_path / "served", tmp_path / "out"
    served.mkdir()
    out.mkdir()
    model = load_reference(tiny_checkpoint)
    write_file(served / "model.gguf", model, {}, Vocabulary(tiny_checkpoint, model.config.vocab_size), "float32")
    copy_tokenizer(tiny_checkpoint, served)
    options = {"dtype": "float32", **SpeculationSpec(method="ngram", ngram_size=2).options}
    Serving("llama.cpp", options=options).write(served)
    spec = SPEC.model_copy(update={"changed_answers": None, "batch_sizes": (2,), "rounds": 2, "windows": 2})
    metrics = evaluate(spec, served=served, baseline=baseline, evaluation=text, out=out)
    comparison = Comparison.read(out)
    assert comparison.plain and [one.batch_size for one in comparison.plain.speeds] == [2]
    assert {"speculation_speedup_2", "speculation_speedup_2_low"} <= metrics.keys() and metrics["tokens_per_pass_2"] >= 1
    assert comparison.variant.roofline is None, "a pass reads the weights for several tokens"
