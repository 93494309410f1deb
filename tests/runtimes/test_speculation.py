"""Speculation: what is drafted, who drafts, and that the text is the one without, token for token."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from featherweight.errors import ParityError, RecipeError
from featherweight.progress import Progress
from featherweight.runtimes import lossless, parity
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.interface import Limits, LoadedModel, Tokens
from featherweight.runtimes.line import Ask, Schedule
from featherweight.runtimes.llama_cpp.loaded import LlamaCppModel, Place
from featherweight.runtimes.llama_cpp.vocabulary import Vocabulary
from featherweight.runtimes.llama_cpp.write import write_file
from featherweight.runtimes.lossless import check_lossless, hold_same, speculates, without_speculation
from featherweight.runtimes.spec import CompileSpec, ExportSpec
from featherweight.runtimes.speculation import DRAFT, Repetitions, SpeculationSpec, next_draft_tokens, speculation_of
from featherweight.runtimes.writing import Source, load_reference, write_served
from featherweight.store.served_folder import Serving
from tests.support.families import write_pairs
from tests.support.in_process import InProcess

NGRAM = SpeculationSpec(method="ngram", tokens=4, ngram_size=2)
llama_cpp = pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp is not installed")


# What is drafted


def test_what_followed_the_last_tokens_where_they_stood_before_is_drafted_again() -> None:
    before = Repetitions(2)
    assert before.after([1, 2], 4) == [], "nothing stood before"
    assert before.after([1, 2, 3, 1, 2], 1) == [3]
    assert before.after([1, 2, 3, 1, 2, 3, 1], 5) == [2, 3, 1, 2, 3], "on into what is drafted itself"
    assert before.after([1, 2, 3, 1, 2, 3, 1], 0) == []


def test_the_latest_place_is_gone_on_from() -> None:
    assert Repetitions(2).after([1, 2, 3, 1, 2, 4, 1, 2], 1) == [4]
    assert Repetitions(2).after([7], 4) == [] == Repetitions(2).after([], 4)


def test_more_is_drafted_behind_what_was_accepted() -> None:
    assert [next_draft_tokens(NGRAM, accepted) for accepted in (0, 1, 2)] == [1, 3, 4]


def test_a_method_may_stand_for_itself_and_a_served_folder_says_it() -> None:
    assert ExportSpec.of(engine="llama.cpp", speculation="ngram").speculation == SpeculationSpec(method="ngram")
    spec = ExportSpec.of(engine="llama.cpp", speculation={"method": "ngram", "tokens": 6})
    assert spec.speculation and speculation_of(spec.speculation.options) == spec.speculation
    assert speculation_of({"dtype": "float32"}) is None
    plain = spec.without_speculation
    assert plain == ExportSpec.of(engine="llama.cpp") and "speculation" not in plain.model_dump(), "no key of before changes"
    for wrong in (
        *("oracle", "draft", {"method": "ngram", "tokens": 0}, {"method": "ngram", "size": 3}),
        *({"method": "ngram", "draft": "half"}, {"method": "draft", "draft": "half", "ngram_size": 2}),
    ):
        with pytest.raises(ValueError, match="speculation"):
            ExportSpec.of(engine="llama.cpp", speculation=wrong)


# Who drafts


@pytest.mark.parametrize("spec", [{"engine": "ctranslate2"}, {"engine": "torch"}, {"engine": "onnxruntime-genai"}])
def test_engines_that_draft_nothing_say_so(spec: dict[str, str]) -> None:
    kind = CompileSpec if spec["engine"] == "onnxruntime-genai" else ExportSpec
    asked = kind.of(**spec, speculation="ngram")
    reason = RUNTIMES[asked.engine].speculation_refusal(asked)
    assert reason and "writes one token a pass here, and not by ngram" in reason and "take another engine" in reason
    assert RUNTIMES[asked.engine].speculation_refusal(asked.without_speculation) is None


def test_it_is_refused_when_it_is_written_too(tiny_checkpoint: Path, tmp_path: Path) -> None:
    asked = ExportSpec.of(engine="ctranslate2", speculation="ngram")
    with pytest.raises(RecipeError, match=r"speculation \+ ctranslate2: ctranslate2 writes one token a pass"):
        write_served(asked, checkpoint=tiny_checkpoint, calibration=tmp_path, out=tmp_path)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({}, "it is OpenVINO GenAI that drafts tokens; say batching: continuous"),
        ({"batching": "continuous", "precision": "int4"}, "OpenVINO writes another text where several tokens pass at once"),
        ({"batching": "continuous", "precision": "int4", "activations": "float"}, None),
        ({"batching": "continuous"}, None),
    ],
)
def test_openvino_says_what_it_wants_for_it(keys: dict[str, str], told: str | None) -> None:
    reason = RUNTIMES["openvino"].speculation_refusal(CompileSpec.of(engine="openvino", speculation="ngram", **keys))
    assert reason is None if told is None else told in str(reason)


def test_vllm_is_refused_with_its_reason_and_a_method_that_an_engine_lacks_by_name() -> None:
    asked = ExportSpec.of(engine="vllm", speculation="ngram")
    assert "ends where one text is drawn with top_k; take another engine" in str(RUNTIMES["vllm"].speculation_refusal(asked))
    drafted = CompileSpec.of(engine="openvino", batching="continuous", speculation={"method": "draft", "draft": "half"})
    reason = RUNTIMES["openvino"].speculation_refusal(drafted)
    assert "openvino speculates by ngram here, and not by draft" in str(reason)


# That nothing changes


def test_the_first_place_that_differs_is_told() -> None:
    hold_same([[1, 2]], [[5, 6]], [[5, 6]])
    with pytest.raises(ParityError, match="behind a prompt of 2 tokens: new token 2 is 7 with it, 6 without"):
        hold_same([[9], [1, 2]], [[4], [5, 7]], [[4], [5, 6]])
    with pytest.raises(ParityError, match="new token 3 is none with it, 8 without"):
        hold_same([[1]], [[5, 6]], [[5, 6, 8]])


def test_the_same_files_are_served_without_it(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("weights")
    (tmp_path / "adapters").mkdir()
    Serving("llama.cpp", options={"dtype": "float16", **NGRAM.options}, max_tokens=96).write(tmp_path)
    with without_speculation(tmp_path) as plain:
        assert speculates(tmp_path) and not speculates(plain)
        assert Serving.read(plain) == Serving("llama.cpp", options={"dtype": "float16"}, max_tokens=96)
        assert (plain / "model.gguf").read_text() == "weights" and (plain / "adapters").is_dir()
    assert not plain.exists() and (tmp_path / "model.gguf").exists()


# llama.cpp

PASSAGE = [40, 41, 42, 43]
PROMPTS = [[1, 30, 31], [1, *PASSAGE * 6], [1, *range(30, 60)], [1, *PASSAGE, 50, *PASSAGE]]
SETTINGS: list[dict[str, Any]] = [
    {"eos_token_id": [43, 300]},
    {"repetition_penalty": 1.3},
    {"no_repeat_ngram_size": 3},
    {"suppress_tokens": [40, 41], "min_new_tokens": 5, "eos_token_id": 2},
    {"forced_eos_token_id": 2, "eos_token_id": 2},
    {"do_sample": True, "temperature": 0.2, "top_k": 3},
]


@pytest.fixture(scope="module")
def served(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    model = load_reference(tiny_checkpoint)
    write_file(folder / "model.gguf", model, {}, Vocabulary(tiny_checkpoint, model.config.vocab_size), "float32")
    return folder


def loaded(served: Path, max_batch: int, **options: str) -> LoadedModel:
    serving = Serving("llama.cpp", options={"dtype": "float32", **options})
    return RUNTIMES["llama.cpp"].loaded_model()(served, serving, Limits(threads=1, max_tokens=96, max_batch=max_batch))


@pytest.fixture(scope="module")
def both(served: Path) -> Iterator[tuple[LoadedModel, LoadedModel]]:
    """The same model without and with speculation, two texts at once."""
    sides = loaded(served, 2), loaded(served, 2, **NGRAM.options)
    yield sides
    for side in sides:
        side.unload()


@llama_cpp
@pytest.mark.engine
def test_llama_cpp_writes_the_same_text_in_fewer_passes(both: tuple[LoadedModel, LoadedModel]) -> None:
    plain, drafting = both
    assert plain.acceptance() is None
    for new_tokens in (1, 2, 60):
        assert drafting.generate(PROMPTS, new_tokens).tokens == plain.generate(PROMPTS, new_tokens).tokens
    alone = [drafting.generate([prompt], 60).tokens[0] for prompt in PROMPTS]
    assert alone == plain.generate(PROMPTS, 60).tokens
    told = drafting.acceptance()
    assert told and told.written == 8 * 60 + 4 * 3 and told.passes < 0.7 * told.written
    assert drafting.logprobs([PROMPTS[2]]) == plain.logprobs([PROMPTS[2]])


@llama_cpp
@pytest.mark.engine
@pytest.mark.parametrize("settings", SETTINGS)
def test_whatever_the_settings_ask_the_text_is_the_same(settings: dict[str, Any], both: tuple[LoadedModel, LoadedModel]) -> None:
    texts: list[Tokens] = []
    for side in both:
        torch.manual_seed(0)
        texts.append([side.answer([prompt], 40, settings)[0] for prompt in PROMPTS])
    assert texts[0] == texts[1] and any(texts[0])


@llama_cpp
@pytest.mark.engine
@pytest.mark.parametrize("same", [True, False])
def test_a_draft_model_changes_nothing(
    same: bool, served: Path, both: tuple[LoadedModel, LoadedModel], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    model = load_reference(tiny_checkpoint)
    (tmp_path / DRAFT).mkdir()
    (tmp_path / "model.gguf").symlink_to(served / "model.gguf")
    if not same:
        torch.nn.init.normal_(model.get_submodule("model.layers.0.mlp.down_proj").get_parameter("weight"))
    vocabulary = Vocabulary(tiny_checkpoint, model.config.vocab_size)
    write_file(tmp_path / DRAFT / "model.gguf", model, {}, vocabulary, "float32")
    Serving("llama.cpp", options={"dtype": "float32"}).write(tmp_path / DRAFT)
    drafting = loaded(tmp_path, 2, **SpeculationSpec(method="draft", draft="half", tokens=3).options)
    assert drafting.generate(PROMPTS, 50).tokens == both[0].generate(PROMPTS, 50).tokens
    told = drafting.acceptance()
    assert told and told.written == 200 and (told.passes < 80 if same else told.passes > 100)
    for settings in SETTINGS:
        torch.manual_seed(0)
        expected = both[0].answer([PROMPTS[3]], 40, settings)
        torch.manual_seed(0)
        assert drafting.answer([PROMPTS[3]], 40, settings) == expected
    drafting.unload()


class Heard(Schedule):
    """Keeps the texts."""

    def __init__(self, asks: list[Ask]) -> None:
        super().__init__(asks, [0.0] * len(asks))
        self.texts: dict[Ask, list[int]] = {}

    def done(self, ask: Ask, tokens: list[int], at: float | None = None) -> None:
        self.texts[ask] = tokens
        super().done(ask, tokens, at)


@llama_cpp
@pytest.mark.engine
def test_texts_that_join_and_end_while_others_are_written_are_the_same(both: tuple[LoadedModel, LoadedModel]) -> None:
    found = []
    for side in both:
        asks = [Ask(prompt, new) for new in (5, 40) for prompt in PROMPTS] + [Ask(PROMPTS[1], 30, SETTINGS[1])]
        line = Heard(asks)
        side.converse(line)
        found.append([line.texts[ask] for ask in asks])
    assert found[0] == found[1] and [len(text) for text in found[0]] == [5] * 4 + [40] * 4 + [30]


class Gullible(LlamaCppModel):
    """Accepts whatever is drafted."""

    def _go_on(self, place: Place, slot: int, logits: Any) -> Iterator[Place]:
        honest, drafted = place.choose, list(place.drafted)
        place.choose = lambda place, row: drafted.pop(0) if drafted else honest(place, row)
        yield from super()._go_on(place, slot, logits)
        place.choose = honest


@llama_cpp
@pytest.mark.engine
def test_an_engine_that_accepts_whatever_is_drafted_is_caught(
    served: Path, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lossless, "open_worker", InProcess)
    Serving("llama.cpp", options={"dtype": "float32", **NGRAM.options}).write(served)
    source = Source(tiny_checkpoint, write_pairs(tmp_path / "text"), None, 0, Progress(), 96)
    check_lossless(served, source)
    monkeypatch.setattr(InProcess, "loaded", Gullible)
    with pytest.raises(ParityError, match=r"speculation changes the text behind a prompt of \d+ tokens: new token"):
        check_lossless(served, source)


@llama_cpp
@pytest.mark.engine
def test_what_is_exported_with_it_is_held_to_pytorch_and_to_itself_without(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in (parity, lossless):
        monkeypatch.setattr(room, "open_worker", InProcess)
    out = tmp_path / "out"
    out.mkdir()
    asked = ExportSpec.of(engine="llama.cpp", precision="int8", max_tokens=96, speculation={"method": "ngram", "ngram_size": 2})
    metrics = write_served(asked, checkpoint=tiny_checkpoint, calibration=write_pairs(tmp_path / "text"), out=out)
    assert metrics["parity_mean_abs"] < metrics["parity_bound"]
    assert speculates(out) and Serving.read(out).max_tokens == 96


@llama_cpp
@pytest.mark.engine
def test_a_draft_is_served_beside_what_it_drafts_for_where_its_tokens_are_the_same(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in (parity, lossless):
        monkeypatch.setattr(room, "open_worker", InProcess)
    text, out, draft, other = (tmp_path / name for name in ("text", "out", "draft", "other"))
    for folder in (out, draft):
        folder.mkdir()
    told = {"checkpoint": tiny_checkpoint, "calibration": write_pairs(text)}
    write_served(ExportSpec.of(engine="llama.cpp", precision="float16", max_tokens=96), out=draft, **told)
    asked = ExportSpec.of(engine="llama.cpp", max_tokens=96, speculation={"method": "draft", "draft": "half"})
    write_served(asked, out=out, draft=draft, **told)
    assert (out / DRAFT / "model.gguf").samefile(draft / "model.gguf")
    assert Serving.read(out / DRAFT).options["dtype"] == "float16" and Serving.read(out).options["dtype"] == "float32"
    shutil.copytree(draft, other)
    tokens = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    piece = next(iter(set(vocabulary) - {part for pair in tokens["model"]["merges"] for part in ("".join(pair), *pair)}))
    vocabulary[f"{piece}{piece}"] = vocabulary.pop(piece)
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    shutil.rmtree(out)
    out.mkdir()
    with pytest.raises(RecipeError, match=r"speculation\.draft has other tokens than what it is to draft for"):
        write_served(asked, out=out, draft=other, **told)
