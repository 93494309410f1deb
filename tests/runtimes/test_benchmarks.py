"""Accuracy in lm-evaluation-harness's tasks: what its own HFLM finds of the same checkpoint (extra `benchmarks`, else skipped)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from featherweight.checkpoint.tokenizer import load_tokenizer
from featherweight.errors import DataError, RecipeError
from featherweight.measure.benchmark_files import documents, fingerprint, require
from featherweight.measure.spec import BenchmarkSpec, WorkloadSpec
from featherweight.store.served_folder import Serving

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra 'benchmarks')")


@pytest.fixture(scope="module")
def asked(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, BenchmarkSpec]:
    """Choices for any model; and texts whose last word the tiny model itself would write, and one that it would not."""
    from transformers import AutoModelForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("data"), load_tokenizer(tiny_checkpoint)
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval()
    choices = [{"goal": f"carry {n} stones", "sol1": f"take {n} bags", "sol2": "sing to them"} for n in range(6)]
    texts = ["once upon a time there was nothing"]
    for start in ("the little fox", "a day in the wood", "rain and"):
        ids = tokenizer(start, return_tensors="pt").input_ids
        for length in range(1, 24):
            written = model.generate(ids, max_new_tokens=length, min_new_tokens=length, do_sample=False, pad_token_id=0)
            text = str(tokenizer.decode(written[0], skip_special_tokens=True))
            texts += [text] if len(text.split(" ")) > len(start.split(" ")) else []
    for name, rows in (("choices", choices), ("texts", [{"text": text} for text in texts])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "labels.lst").write_text("0\n1\n0\n1\n1\n0\n")
    return {
        "piqa": BenchmarkSpec(file=str(folder / "choices.jsonl"), labels=str(folder / "labels.lst")),
        "written": BenchmarkSpec(task="lambada_openai", file=str(folder / "texts.jsonl"), limit=30),
    }


@pytest.mark.engine
@pytest.mark.slow
def test_the_worker_finds_what_the_harness_finds(asked: dict[str, BenchmarkSpec], tiny_checkpoint: Path, tmp_path: Path) -> None:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    from featherweight.runtimes.benchmarks import hits, local_task
    from featherweight.runtimes.client import open_worker

    served = tmp_path / "served"
    shutil.copytree(tiny_checkpoint, served)
    Serving("torch").write(served)
    with open_worker(served, 1, 128) as worker:
        ours = hits(worker, served, asked)
    theirs = HFLM(pretrained=str(tiny_checkpoint), device="cpu", dtype="float32", max_length=127, batch_size=4)
    for name, spec in asked.items():
        task = spec.task or name
        found = evaluate(lm=theirs, task_dict=local_task(task, documents(spec)), bootstrap_iters=0)
        samples = sorted(found["samples"][task], key=lambda one: one["doc_id"])
        assert list(ours[name]) == [float(one["acc"]) for one in samples]
        assert sum(ours[name]) / len(ours[name]) == found["results"][task]["acc,none"]
    assert 0 < sum(ours["piqa"]) < 6


def test_what_cannot_be_run_is_refused_before_anything_is(asked: dict[str, BenchmarkSpec], tmp_path: Path) -> None:
    piqa = asked["piqa"]
    with pytest.raises(DataError, match=r"workload\.benchmarks\.piqa: there is no file nowhere\.jsonl"):
        require(WorkloadSpec(benchmarks={"piqa": BenchmarkSpec(file="nowhere.jsonl")}))
    with pytest.raises(RecipeError, match="has no task no-such-task"):
        require(WorkloadSpec(benchmarks={"mine": piqa.model_copy(update={"task": "no-such-task"})}))
    (tmp_path / "short").write_text("0\n1\n")
    with pytest.raises(DataError, match="a label a line"):
        documents(piqa.model_copy(update={"labels": str(tmp_path / "short")}))
    assert [row["label"] for row in documents(piqa.model_copy(update={"limit": 3}))] == [0, 1, 0]


def test_a_benchmarks_files_are_known_to_the_cache_key_and_nothing_of_them_to_another_recipes(
    asked: dict[str, BenchmarkSpec], tmp_path: Path
) -> None:
    plain, spec = WorkloadSpec(), WorkloadSpec(benchmarks=asked)
    assert fingerprint(plain) is None and "benchmarks" not in plain.model_dump()
    changed = tmp_path / "texts.jsonl"
    changed.write_text(Path(asked["written"].file).read_text() + "\n")
    other = WorkloadSpec(benchmarks={**asked, "written": asked["written"].model_copy(update={"file": str(changed)})})
    assert fingerprint(spec) == fingerprint(spec) != fingerprint(other)
