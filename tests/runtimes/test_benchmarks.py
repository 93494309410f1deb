"""Accuracy in lm-evaluation-harness's tasks: what its own HFLM finds of the same checkpoint (extra `benchmarks`, else skipped)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from featherweight.checkpoint.tokenizer import load_tokenizer
from featherweight.errors import DataError, RecipeError
from featherweight.measure.benchmark_files import amount, documents, fingerprint, require, shots, writes
from featherweight.measure.spec import BenchmarkSpec, WorkloadSpec
from featherweight.runtimes.interface import Tokens
from featherweight.store.served_folder import Serving
from tests.support.in_process import InProcess

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
        found = evaluate(lm=theirs, task_dict=local_task(task, documents(spec), spec), bootstrap_iters=0)
        samples = sorted(found["samples"][task], key=lambda one: one["doc_id"])
        assert list(ours[name]) == [float(one["acc"]) for one in samples]
        assert sum(ours[name]) / len(ours[name]) == found["results"][task]["acc,none"]
    assert 0 < sum(ours["piqa"]) < 6


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> BenchmarkSpec:
    """Questions in GSM8K's form, two of which stand in front of each."""
    folder = tmp_path_factory.mktemp("sums")
    for name, first in (("test", 3), ("train", 20)):
        rows = [
            {"question": f"a fox carries {n} stones and {n} more", "answer": f"{n}+{n}\n#### {2 * n}"}
            for n in range(first, 9 + first)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = {"file": str(folder / "test.jsonl"), "examples": str(folder / "train.jsonl")}
    return BenchmarkSpec(task="gsm8k", limit=4, shots=2, new_tokens=20, filter="flexible-extract", **files)


@pytest.mark.engine
@pytest.mark.slow
def test_a_worker_writes_what_the_harness_has_written(sums: BenchmarkSpec, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Of each prompt, cut where it is too long; up to the words that end a text; and what is counted of it."""
    from lm_eval.api.instance import Instance
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    from featherweight.runtimes.benchmarks import _right, hits, local_task
    from featherweight.runtimes.client import open_worker
    from featherweight.runtimes.harness_model import HarnessModel

    served = tmp_path / "served"
    shutil.copytree(tiny_checkpoint, served)
    Serving("torch").write(served)
    theirs = HFLM(pretrained=str(tiny_checkpoint), device="cpu", dtype="float32", max_length=64, batch_size=1)
    texts = ["the little fox", "a day in the wood " * 20, "rain and", "once upon a time"]
    plain = {"until": [], "do_sample": False, "max_gen_toks": 12}
    whole = theirs.generate_until([Instance("generate_until", {}, (text, plain), 0) for text in texts], disable_tqdm=True)
    word = whole[0][len(whole[0]) // 2 :][:3]
    asked = [Instance("generate_until", {}, (text, plain | {"until": [word]}), 0) for text in texts]
    with open_worker(served, 1, 64, max_batch=3) as worker:
        ours = HarnessModel(worker, load_tokenizer(served), greedy=False)
        assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)
        assert word not in ours.generate_until(asked[:1])[0] and word in whole[0]
        found = hits(worker, served, {"sums": sums})["sums"]
    reference = evaluate(lm=theirs, task_dict=local_task("gsm8k", documents(sums), sums), bootstrap_iters=0, log_samples=True)
    samples = reference["samples"]["gsm8k"]
    assert found == _right("gsm8k", samples, "flexible-extract") and len(found) == 4
    assert sum(found) / 4 == reference["results"]["gsm8k"]["exact_match,flexible-extract"]
    front = (
        samples[0]["arguments"][0][0]
        if isinstance(samples[0]["arguments"], list)
        else samples[0]["arguments"]["gen_args_0"]["arg_0"]
    )
    assert front.count("Question: ") == 3, "two examples stand in front"


def test_every_variant_is_asked_with_the_same_examples_in_front(sums: BenchmarkSpec) -> None:
    from featherweight.runtimes.benchmarks import local_task

    drawn = [local_task("gsm8k", documents(sums), sums)["tasks"]["gsm8k"].sampler.sample(2) for _ in range(4)]
    assert drawn[0] == drawn[1] == drawn[2] == drawn[3]


class Recorded(InProcess):
    """One that keeps what it is asked to write behind."""

    engine, max_tokens, max_batch = "torch", 512, 8

    def __init__(self, served: Path) -> None:
        super().__init__(served)
        self.asked: list[tuple[list[int], dict[str, Any]]] = []

    def answer(self, prompts: Tokens, new_tokens: int, settings: dict[str, Any], adapter: str | None = None) -> Tokens:
        self.asked += [(prompt, settings) for prompt in prompts]
        return super().answer(prompts, new_tokens, settings, adapter)


def test_a_chat_has_the_examples_as_earlier_turns_and_ends_where_the_checkpoint_ends_its_turns(
    sums: BenchmarkSpec, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    from featherweight.runtimes.benchmarks import hits

    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "chat"))
    told = {"eos_token_id": [2, 5], "do_sample": True, "temperature": 0.6, "repetition_penalty": 1.1, "max_length": 20}
    (folder / "generation_config.json").write_text(json.dumps(told))
    Serving("torch").write(folder)
    worker: Any = Recorded(folder)
    chat = {"sums": sums.model_copy(update={"chat": True, "limit": 1})}
    with pytest.raises(RecipeError, match="has no chat template; leave chat out"):
        hits(worker, folder, chat)
    template = (
        "{% for one in messages %}<{{ one.role }}>{{ one.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    assert len(hits(worker, folder, chat)["sums"]) == 1
    (prompt, settings), *others = worker.asked
    asked = load_tokenizer(folder).decode(prompt)
    assert not others
    assert asked.count("<user>") == 3 and asked.count("<assistant>") == 3 and asked.rstrip().endswith("<assistant>")
    assert settings.pop("repetition_penalty") == 1.1
    assert list(settings) == ["eos_token_id"] and set(settings["eos_token_id"]) >= {2, 5}


def test_an_answer_that_is_read_in_several_ways_is_counted_in_the_one_that_is_asked_for() -> None:
    from featherweight.runtimes.benchmarks import _right

    samples = [
        {"doc_id": doc, "filter": way, "exact_match": float(value)}
        for way, values in (("strict", (0, 0)), ("loose", (1, 0)))
        for doc, value in reversed(list(enumerate(values)))
    ]
    assert _right("sums", samples, None) == (0.0, 0.0) and _right("sums", samples, "loose") == (1.0, 0.0)
    with pytest.raises(RecipeError, match="sums reads its answers by strict or loose, not by other"):
        _right("sums", samples, "other")
    with pytest.raises(RecipeError, match="counts no right answers; take one whose metric is acc or exact_match"):
        _right("sums", [{"doc_id": 0, "filter": "none", "bleu": 1.0}], None)


def test_the_plan_knows_what_benchmarks_take(asked: dict[str, BenchmarkSpec], sums: BenchmarkSpec, tmp_path: Path) -> None:
    from featherweight.recipe.cost import _benchmarks

    examples, tokens = amount(sums)
    front, own = (sum(map(len, Path(name or "").read_bytes().splitlines())) / 9 for name in (sums.examples, sums.file))
    assert examples == 4 and tokens == pytest.approx((own + 2 * front) / 4)
    assert writes("sums", sums) and not writes("piqa", asked["piqa"])
    read, steps = _benchmarks(WorkloadSpec(benchmarks={"sums": sums}))
    assert steps == 4 * 20 and read == pytest.approx(4 * (tokens + 20))
    read, steps = _benchmarks(WorkloadSpec(benchmarks={"piqa": asked["piqa"]}))
    assert steps == 0 and read == pytest.approx(2 * 6 * amount(asked["piqa"])[1])
    assert amount(BenchmarkSpec(file="nowhere")) == (0, 0.0)
    with pytest.raises(DataError, match="holds 9 examples, and 10 are to stand in front"):
        shots(sums.model_copy(update={"shots": 10}))
    with pytest.raises(ValueError, match="go together"):
        BenchmarkSpec(file="x", shots=2)


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
