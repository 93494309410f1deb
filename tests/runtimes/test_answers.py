"""Every engine answers as transformers' `generate` does with the checkpoint's generation settings, or refuses them by name."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from featherweight.checkpoint.tokenizer import load_tokenizer
from featherweight.errors import RecipeError, StageError
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.generation_settings import EVERYTHING, FOLLOWED_BY_NONE, WITHOUT_EFFECT, GenerationSettings, processors
from featherweight.runtimes.interface import EngineServer, Limits, LoadedModel
from featherweight.runtimes.line import Ask, Schedule
from featherweight.store.served_folder import Serving
from featherweight.text.documents import Document, write_documents
from tests.support import serving_models, tokenizers
from tests.support.serving_models import serving_spec
from tests.support.waiting import until

pytestmark = pytest.mark.slow

NEW = 24
PROMPTS = ["The river and the stone", "漢字 🙂 The", "The river, the lamp"]
ENGINES = ("torch", "ctranslate2", "onnxruntime-genai")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers") / "checkpoint"
    return serving_models.make("llama", folder, tokenizers.byte_level(), initializer_range=0.3)


@pytest.fixture(scope="module")
def engines(checkpoint: Path) -> dict[str, LoadedModel]:
    from featherweight.runtimes.parity import Reference
    from tasks.compile import compile
    from tasks.export import export

    text, folders = checkpoint.parent / "text", {name: checkpoint.parent / name for name in ENGINES}
    write_documents(text, [Document(str(i), "the river and the stone. " * 40) for i in range(4)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reference, "check", lambda *_: {})
        for name, folder in folders.items():
            folder.mkdir()
            stage = compile if name == "onnxruntime-genai" else export
            stage(serving_spec(engine=name), checkpoint=checkpoint, calibration=text, out=folder)
    serving = {name: Serving.read(folder) for name, folder in folders.items()}
    loaded = {name: RUNTIMES[name].loaded_model() for name in ENGINES}
    return {name: loaded[name](folders[name], serving[name], Limits(1, 128, 4)) for name in ENGINES}


def test_each_setting_of_transformers_is_followed_refused_or_without_effect() -> None:
    """A version of transformers with settings that nobody has decided on fails here."""
    from transformers import GenerationConfig

    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert sorted(known - EVERYTHING - {*FOLLOWED_BY_NONE, *WITHOUT_EFFECT}) == []
    assert not EVERYTHING & {*FOLLOWED_BY_NONE} and not WITHOUT_EFFECT.keys() & EVERYTHING.union(FOLLOWED_BY_NONE)
    told = GenerationSettings.of(GenerationConfig(max_time=2.0, penalty_alpha=0.0))
    assert "does not follow max_time; take it out of that file" in str(told.refusal(EVERYTHING, "torch"))
    below = GenerationConfig(min_length=-1, min_new_tokens=-1, no_repeat_ngram_size=-1, encoder_no_repeat_ngram_size=-1)
    assert GenerationSettings.of(below).values == {}, "generate passes them by, of which its processors would raise errors"


def test_settings_that_an_engine_does_not_follow_are_refused_before_it_is_written(checkpoint: Path, tmp_path: Path) -> None:
    from tasks.export import export

    shutil.copytree(checkpoint, tmp_path / "asks")
    said = {"eos_token_id": [1, 2], "begin_suppress_tokens": [7], "stop_strings": ["stone"]}
    (tmp_path / "asks" / "generation_config.json").write_text(json.dumps(said))
    with pytest.raises(RecipeError, match=r"ctranslate2 cannot write as .* does not follow begin_suppress_tokens, stop_strings; "):
        export(serving_spec(engine="ctranslate2"), checkpoint=tmp_path / "asks", calibration=tmp_path, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "lead", "refused"),
    [
        ({"repetition_penalty": 1.1}, [], True),
        ({"no_repeat_ngram_size": 2}, [1], True),
        ({"repetition_penalty": 1.1}, [0], False),
        ({"suppress_tokens": [3]}, [], False),
    ],
)
def test_penalties_that_miss_the_first_token_of_a_prompt_are_refused(asked: dict[str, Any], lead: list[int], refused: bool) -> None:
    """CTranslate2 counts none: where no BOS stands there, another token that may be written again."""
    from featherweight.runtimes.ctranslate2.runtime import penalty_refusal

    reason = penalty_refusal(GenerationSettings({"eos_token_id": 1, **asked}), lead)
    assert ("does not count a prompt's first token" in str(reason)) == refused


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def prompts(checkpoint: Path) -> list[list[int]]:
    tokenizer = tokenizers.byte_level()
    return [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]


def written(model: Any, prompt: list[int], **options: Any) -> list[int]:
    import torch

    given = torch.tensor([prompt])
    found = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=NEW, pad_token_id=0, **options)
    return found[0, len(prompt) :].tolist()


def expected(model: Any, prompt: list[int], ends: list[int], **options: Any) -> list[int]:
    row = written(model, prompt, eos_token_id=ends, **options)
    return next((row[: place + 1] for place, token in enumerate(row) if token in ends), row)


def settings(plain: list[list[int]]) -> dict[str, dict[str, Any]]:
    """By name, settings that change what is written."""
    third, words = plain[0][2], [[plain[0][2]], plain[1][2:4]]
    both = {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "suppress_tokens": [third]}
    return {
        "two ends": {},
        "repetition": {"repetition_penalty": 1.3},
        "n-grams": {"no_repeat_ngram_size": 1},
        "suppressed": {"suppress_tokens": [third, plain[1][1]]},
        "bad words": {"bad_words_ids": words},
        "an end as a bad word": {"bad_words_ids": [[plain[0][5]], [third]]},
        "shortest": {"min_new_tokens": 12},
        "shortest with prompt": {"min_length": 20},
        "begin": {"begin_suppress_tokens": [plain[0][0], plain[1][0]]},
        "forced end": {"forced_eos_token_id": plain[0][5]},
        "forced to go on": {"forced_eos_token_id": [305, 303]},
        "not of the vocabulary": {"suppress_tokens": [-1, 10**6]},
        "no share": {"do_sample": True, "top_k": 0, "top_p": 0.0},
        "several": both,
    }


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", settings([[0] * 9] * 2))
def test_answers_are_those_of_transformers(
    engines: dict[str, LoadedModel], model: Any, prompts: list[list[int]], engine: str, name: str
) -> None:
    from transformers import GenerationConfig

    plain = [written(model, prompt, eos_token_id=None) for prompt in prompts]
    ends, options = [plain[0][5], plain[1][9]], settings(plain)[name]
    values = GenerationSettings.of(GenerationConfig(eos_token_id=ends, **options)).values
    right = [expected(model, prompt, ends, **options) for prompt in prompts]
    if set(values) <= engines[engine].follows:
        assert engines[engine].answer(prompts, NEW, values) == right
        assert name != "two ends" or len(right[0]) == 6
    else:
        with pytest.raises(StageError, match=f"does not follow {sorted(set(values) - engines[engine].follows)[0]}"):
            engines[engine].answer(prompts, NEW, values)


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"length_penalty": 2.0},
        {"length_penalty": 0.0},
        {"length_penalty": -1.0},
        {"early_stopping": True},
        {"forced_eos_token_id": "end"},
    ],
)
def test_texts_that_are_searched_for_together_count_their_end(
    engines: dict[str, LoadedModel], model: Any, prompts: list[list[int]], asked: dict[str, Any]
) -> None:
    """CTranslate2 weighed them by lengths without it, and one that a forced end closes by the length without that."""
    found = []
    for place in range(4, 16):
        end = written(model, prompts[0], eos_token_id=None)[place]
        options = {"num_beams": 3, **asked} | ({"forced_eos_token_id": end} if "forced_eos_token_id" in asked else {})
        right = [expected(model, prompt, [end], **options) for prompt in prompts]
        found.append(engines["ctranslate2"].answer(prompts, NEW, {"eos_token_id": end, **options}) == right)
    assert all(found)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_penalties_leave_the_first_word_behind_a_prompt_with_bos(
    engines: dict[str, LoadedModel], model: Any, prompts: list[list[int]], engine: str
) -> None:
    """CTranslate2 gives a prompt back that penalties are to see, but for its BOS: the first new token was taken off with it."""
    asked = [[0, *prompts[0]], [0, *prompts[1]], prompts[0]]
    right = [expected(model, prompt, [1], repetition_penalty=1.3) for prompt in asked]
    assert engines[engine].answer(asked, NEW, {"eos_token_id": 1, "repetition_penalty": 1.3}) == right


def test_a_text_for_each_prompt_comes_back_whatever_else_the_checkpoint_asks_for(
    checkpoint: Path, model: Any, prompts: list[list[int]], tmp_path: Path
) -> None:
    """Several texts, tensors of scores, guessing ahead, which transformers does for one prompt at a time."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "asks"))
    asked = {"num_return_sequences": 2, "return_dict_in_generate": True, "output_scores": True, "cache_implementation": "static"}
    (folder / "generation_config.json").write_text(json.dumps(asked | {"prompt_lookup_num_tokens": 3, "num_beams": 2}))
    Serving("torch").write(folder)
    values, twice = GenerationSettings.read(folder).values, [prompts[0], prompts[0], prompts[1]]
    found = RUNTIMES["torch"].loaded_model()(folder, Serving.read(folder), Limits(1, 128, 4)).answer(twice, NEW, values)
    assert found == [written(model, prompt, eos_token_id=None, num_beams=2) for prompt in twice]
    (folder / "generation_config.json").write_text(json.dumps({"assistant_early_exit": 1}))
    found = RUNTIMES["torch"].loaded_model()(folder, Serving.read(folder), Limits(1, 128, 4)).answer(twice, NEW, {})
    assert found == [written(model, prompt, eos_token_id=None) for prompt in twice]
    (folder / "generation_config.json").write_text(json.dumps({"cache_implementation": "quantized"}))
    assert "does not follow cache_implementation" in str(GenerationSettings.read(folder).refusal(EVERYTHING, "torch"))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ctranslate2", "onnxruntime-genai"])
@pytest.mark.parametrize("options", [{"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}])
def test_penalties_see_the_prompt(engines: dict[str, LoadedModel], model: Any, engine: str, options: dict[str, Any]) -> None:
    import random

    dice = random.Random(0)
    for _ in range(12):
        prompt = [dice.randrange(5, 300) for _ in range(dice.randrange(1, 12))]
        prompt = prompt + prompt[:1]
        assert engines[engine].answer([prompt], NEW, options) == [written(model, prompt, eos_token_id=None, **options)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("prompt", [[7], [7, 9]])
def test_a_forced_first_token_is_written_behind_one_token_alone(
    engines: dict[str, LoadedModel], model: Any, engine: str, prompt: list[int]
) -> None:
    """A language of translators; a decoder takes it where its prompt is no longer than a start token."""
    for end, least in ((301, 0), (301, 6), (300, 0)):
        options = {"forced_bos_token_id": 300, **({"min_new_tokens": least} if least else {})}
        right = expected(model, prompt, [end], **options)
        assert engines[engine].answer([prompt, prompt], NEW, {"eos_token_id": [end], **options}) == [right, right]


def test_a_text_with_the_padding_token_is_read_whole(engines: dict[str, LoadedModel], model: Any) -> None:
    """GenAI masks its padding token wherever it stands; another one takes its place."""
    genai = engines["onnxruntime-genai"]
    window = [5, genai.stopper, 7, 9, genai.stopper, 3, genai.stopper]  # type: ignore[attr-defined]
    (found,), (right,) = genai.logprobs([window]), engines["torch"].logprobs([window])
    assert found == pytest.approx(right, abs=1e-3)
    window = [5, 7, genai.stopper]  # type: ignore[attr-defined]
    assert genai.generate([window], NEW).tokens == [written(model, window, eos_token_id=None)]


@pytest.mark.parametrize("engine", ENGINES)
def test_sampling_draws_from_what_is_left(engines: dict[str, LoadedModel], prompts: list[list[int]], engine: str) -> None:
    import torch

    values = {"do_sample": True, "top_k": 3, "temperature": 0.7}
    scores = processors(GenerationSettings(values), 4)(torch.tensor([[1]]), torch.arange(9.0)[None])
    assert scores[0].isfinite().tolist() == [False] * 6 + [True] * 3
    assert len({tuple(engines[engine].answer(prompts[:1], 6, values)[0]) for _ in range(12)}) > 1
    narrow = {"do_sample": True, "top_k": 1}
    assert engines[engine].answer(prompts[:1], NEW, narrow) == engines[engine].answer(prompts[:1], NEW, {})


def test_what_says_nothing_new_is_no_setting(tmp_path: Path) -> None:
    said = {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.0, "eos_token_id": [1, 2], "max_length": 40}
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    found = GenerationSettings.read(tmp_path)
    assert found.values == {"eos_token_id": [1, 2], "max_length": 40}
    assert (found.new_tokens(30, 64), GenerationSettings({}).new_tokens(30, 64)) == (10, 64)
    assert GenerationSettings({"eos_token_id": [-1, 3]}).ends == [3]


@pytest.mark.parametrize(
    ("forced", "tokens", "cut"),
    [
        (7, [4, 5, 6], [4, 5, 7]),
        (2, [4, 5, 6], [4, 5, 2]),
        ([9, 7], [4, 5, 6], [4, 5, 7]),
        ([9, 2], [4, 5, 6], [4, 5, 2]),
        (7, [4, 2, 6], [4, 2]),
        (7, [4], [4, 2]),
        (None, [4, 2, 6], [4, 2]),
        (None, [4], [4, 2]),
        (None, [4, 5, 6], [4, 5, 6]),
        (7, [4, 5, 2], [4, 5, 7]),
    ],
)
def test_a_text_has_its_end_and_a_forced_one_is_written(forced: Any, tokens: list[int], cut: list[int]) -> None:
    """As transformers does: of several the first is likeliest, as all are equally so."""
    assert GenerationSettings({"eos_token_id": 2, "forced_eos_token_id": forced}).cut(tokens, 3) == cut


def test_settings_of_a_config_without_a_file_of_their_own(tmp_path: Path) -> None:
    """As transformers reads them: of config.json itself, and no end that it does not name."""
    told = {"model_type": "llama", "num_beams": 3, "no_repeat_ngram_size": 2, "max_length": 40}
    (tmp_path / "config.json").write_text(json.dumps(told))
    assert GenerationSettings.read(tmp_path).values == {"num_beams": 3, "no_repeat_ngram_size": 2, "max_length": 40}


class Heard(Schedule):
    """A line that keeps what is answered."""

    def __init__(self, asks: list[Ask], times_s: list[float]) -> None:
        super().__init__(asks, times_s)
        self.asks, self.texts = asks, dict[Ask, list[int]]()

    def done(self, ask: Ask, tokens: list[int], at: float | None = None) -> None:
        super().done(ask, tokens, at)
        self.texts[ask] = tokens


on_vllm = pytest.mark.skipif(RUNTIMES["vllm"].missing() is not None, reason="the vLLM toolchain is not installed: run 'make setup'")


def for_vllm(place: Path) -> tuple[Path, Any, list[list[int]], list[list[int]]]:
    """A folder that vLLM serves, its model in PyTorch, prompts, and what the model writes behind each where no token is an end."""
    from transformers import AutoModelForCausalLM

    tokenizer = tokenizers.byte_level()
    folder = serving_models.make("llama", place / "vllm", tokenizer, initializer_range=0.3, head_dim=32)
    Serving("vllm", options={"dtype": "float32"}).write(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    return folder, model, prompts, [written(model, prompt, eos_token_id=None) for prompt in prompts]


def healthy(client: httpx.Client) -> bool:
    try:
        return client.get("/health").is_success
    except httpx.TransportError:
        return False


@contextmanager
def running(server: EngineServer, socket: Path) -> Iterator[httpx.Client]:
    """vLLM's own server as it is started for users, but in half the time, for as long as the context lasts, and who asks it."""
    program, script, *told = server.command
    found = f"import sys; sys.path.insert(0, {str(Path(script).parent)!r}); "
    command = [program, "-c", f"{found}import own_ends, start; start.import_once(); own_ends.main()", *told]
    started = subprocess.Popen(command, env=os.environ | server.environment, start_new_session=True)
    try:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), base_url="http://it", timeout=60) as client:
            until(lambda: healthy(client))
            yield client
    finally:
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()


@pytest.mark.engine
@pytest.mark.server
@pytest.mark.slow
@on_vllm
def test_vllms_own_server_ends_texts_as_transformers_does(tmp_path: Path) -> None:
    """It ended them at the tokenizer's end, which generation_config.json does not name here, and left plain ends out."""
    folder, model, prompts, plain = for_vllm(tmp_path)
    tokenizer = tokenizers.byte_level()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(plain[2][3])
    tokenizer.save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    ends = [plain[0][5], plain[1][9]]
    asked = {"eos_token_id": ends, "presence_penalty": 1.5, "frequency_penalty": 1.5}
    (folder / "generation_config.json").write_text(json.dumps(asked))
    right = [tokenizer.decode(expected(model, prompt, ends), skip_special_tokens=True) for prompt in prompts]
    made = RUNTIMES["vllm"].server(folder, "it", Limits(1, 64, 4), tmp_path / "socket")
    assert made is not None and "ends a text at the tokenizer's eos_token too" in str(made.here_alone)
    with running(made, tmp_path / "socket") as client:
        body = {"model": "it", "prompt": prompts, "max_tokens": NEW}
        choices = client.post("/v1/completions", json=body).raise_for_status().json()["choices"]
    assert [one["text"] for one in sorted(choices, key=lambda one: one["index"])] == right


@pytest.mark.engine
@pytest.mark.slow
@on_vllm
def test_vllm_answers_as_transformers_does(tmp_path: Path) -> None:
    folder, model, prompts, plain = for_vllm(tmp_path)
    asked = {"repetition_penalty": 9.0}  # of the server, which would follow it in a measurement too
    (folder / "generation_config.json").write_text(json.dumps(asked))
    ends, engine = [plain[0][5], plain[1][9]], RUNTIMES["vllm"].loaded_model()(folder, Serving.read(folder), Limits(1, 64, 4))
    try:
        for options in ({}, {"repetition_penalty": 1.3}, {"do_sample": True, "top_k": 1}):
            right = [expected(model, prompt, ends, **options) for prompt in prompts]
            assert engine.answer(prompts, NEW, {"eos_token_id": ends, **options}) == right
        assert engine.generate(prompts, NEW).tokens == plain
        heard = Heard([Ask(prompt, NEW, {"eos_token_id": ends}) for prompt in prompts], [0.0, *(0.01 for _ in prompts[1:])])
        engine.converse(heard)
        assert [heard.texts[ask] for ask in heard.asks] == [expected(model, prompt, ends) for prompt in prompts]
        assert all(first is not None and last is not None and first <= last for first, last in heard.times)
    finally:
        engine.unload()
