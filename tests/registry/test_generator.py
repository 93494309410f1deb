"""The served model's prompts and answers against transformers' own: how a text begins, conversations, and where it ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest

from featherweight.errors import DataError
from featherweight.registry import served_engine
from featherweight.registry.generator import Generator, prompts_of
from featherweight.registry.smoke import ask
from featherweight.store.served_folder import Serving
from tests.support import families, serving_models, tokenizers
from tests.support.in_process import InProcess

TEMPLATE = "<s>{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}stone:{% endif %}"
TALK = [{"role": "user", "content": "The river?"}, {"role": "stone", "content": "漢字"}, {"role": "user", "content": "and the"}]
pytestmark = pytest.mark.engine
KINDS: dict[str, Callable[[], Any]] = {
    "none added": tokenizers.byte_level,
    "added": lambda: tokenizers.byte_level("<s> $A"),
    "closed": lambda: tokenizers.byte_level("<s> $A </s>"),
}


@pytest.fixture(scope="module", params=KINDS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that begins texts with BOS or not, a chat template that spells it, and two ends that the model writes."""
    tokenizer = KINDS[request.param]()
    tokenizer.chat_template = TEMPLATE
    folder = serving_models.make("llama", tmp_path_factory.mktemp("served") / "model", tokenizer, initializer_range=0.3)
    Serving("torch").write(folder)
    plain = [written(folder, ids, eos_token_id=None) for ids in (prompt_ids(folder, "The river"), chat_ids(folder))]
    ends = [plain[0][6], plain[1][3]]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "max_new_tokens": 9}))
    return folder


@pytest.fixture(scope="module")
def generator(served: Path) -> Iterator[Generator]:
    made = Generator(served, max_tokens=96, max_batch=3)
    yield made
    made.close()


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def prompt_ids(folder: Path, prompt: str) -> list[int]:
    """As transformers frames it, an end token behind it too where the tokenizer puts one."""
    ids: list[int] = tokenizer_of(folder)(prompt)["input_ids"]
    return ids


def chat_ids(folder: Path) -> list[int]:
    return tokenizer_of(folder).apply_chat_template(TALK, add_generation_prompt=True, return_dict=True)["input_ids"]


def written(folder: Path, ids: list[int], **options: Any) -> list[int]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    options = {"max_new_tokens": 24, **options} if options else {}
    given = torch.tensor([ids])
    found = model.generate(given, attention_mask=torch.ones_like(given), pad_token_id=0, **options)
    return found[0, len(ids) :].tolist()


def answer(folder: Path, ids: list[int], **options: Any) -> str:
    """With the end token in it, which is no special one."""
    tokenizer, new = tokenizer_of(folder), written(folder, ids, **options)
    before = tokenizer.decode(ids, skip_special_tokens=True)
    return tokenizer.decode(ids + new, skip_special_tokens=True)[len(before) :]


def test_answers_are_those_of_transformers(served: Path, generator: Generator) -> None:
    prompts = ["The river", "<s>The river", "漢字 🙂", "stone" * 5]
    assert generator(prompts, 24) == [answer(served, prompt_ids(served, prompt), max_new_tokens=24) for prompt in prompts]
    assert generator(prompts) == [answer(served, prompt_ids(served, prompt)) for prompt in prompts]
    lead = tokenizer_of(served)("a")["input_ids"].count(tokenizer_of(served).bos_token_id)
    assert generator._encode("<s>The river").count(tokenizer_of(served).bos_token_id) == lead + 1


def test_a_conversation_is_what_the_chat_template_makes_of_it(served: Path, generator: Generator) -> None:
    assert generator._encode(TALK) == chat_ids(served)
    assert chat_ids(served).count(tokenizer_of(served).bos_token_id) == 1
    assert generator([TALK, "The river"], 24) == [
        answer(served, chat_ids(served), max_new_tokens=24),
        answer(served, prompt_ids(served, "The river"), max_new_tokens=24),
    ]


def test_contents_of_parts_and_calls_of_tools_are_read_as_openai_has_them(generator: Generator) -> None:
    def parts(*texts: str) -> dict[str, Any]:
        return {"role": "user", "content": [{"type": "text", "text": text} for text in texts]}

    plain = [{"role": "user", "content": "The river\nand"}]
    assert generator._encode([parts("The river", "and")]) == generator._encode(plain)
    by_parts = TEMPLATE.replace("{{ m.content }}", "{% for p in m.content %}[{{ p.text }}]{% endfor %}")
    generator._tokenizer.chat_template, before = by_parts, generator._tokenizer.chat_template
    written = generator._tokenizer.apply_chat_template([parts("The river", "and")], add_generation_prompt=True, return_dict=True)
    assert "[The river][and]" in generator._tokenizer.decode(written["input_ids"])
    assert generator._encode([parts("The river", "and")]) == written["input_ids"]
    generator._tokenizer.chat_template = (
        "{% for m in messages %}{{ m.tool_calls[0].function.name if m.tool_calls else m.content }}{% endfor %}"
    )
    called = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "flow"}}]}
    assert generator._tokenizer.decode(generator._encode([*plain, called])).endswith("The river\nandflow")
    generator._tokenizer.chat_template = before
    for wrong in ({"type": "image_url", "image_url": {"url": "x"}}, "text", {"type": "text", "text": 3}):
        with pytest.raises(DataError, match=r"a part of a message of type '.*': this model reads texts"):
            generator([[{"role": "user", "content": [wrong]}]])
    with pytest.raises(DataError, match="half of a surrogate pair"):
        generator([[parts("\ud83d")]])


def _lacking(prompt: str) -> Any:
    """As a tokenizer without a token for what it does not know."""
    raise ValueError("Missing [UNK] token from the vocabulary")


def test_what_is_no_prompt_is_refused_in_one_line(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (3, [], [{"role": "user"}], ["text"], None, "half \ud83d", [{"role": "user", "content": "\ud83d"}]):
        with pytest.raises(DataError, match=r"a prompt is a text, or a conversation|half of a surrogate pair"):
            generator([wrong])  # type: ignore[list-item]
    with monkeypatch.context() as patch, pytest.raises(DataError, match="the tokenizer does not cut this prompt: Missing"):
        patch.setattr(generator, "_tokenizer", _lacking)
        generator(["a"])
    monkeypatch.setattr(generator._tokenizer, "chat_template", None)
    with pytest.raises(DataError, match="no chat template"):
        generator([TALK])


def test_prompts_come_in_every_shape_that_mlflow_gives() -> None:
    assert prompts_of(["a", "b"]) == prompts_of(pandas.DataFrame({0: ["a", "b"]})) == ["a", "b"]
    assert prompts_of(pandas.DataFrame({"prompt": ["a"]})) == prompts_of({"prompt": "a"}) == ["a"]
    for one in ({"messages": TALK}, pandas.DataFrame({"messages": TALK}), pandas.DataFrame({"messages": [TALK]})):
        assert prompts_of(one) == [TALK]
    assert prompts_of(pandas.DataFrame({"messages": [TALK, TALK[:1]]})) == [TALK, TALK[:1]]
    for rows in (pandas.DataFrame(TALK), pandas.DataFrame(TALK)[["role"]]):  # MLflow keeps the first column
        with pytest.raises(DataError, match="a conversation stands under 'messages', as one list"):
            prompts_of(rows)


@pytest.mark.parametrize("served", ["closed"], indirect=True)
def test_a_smoke_request_fits_what_was_verified(served: Path, tmp_path: Path) -> None:
    short = shutil.copytree(served, tmp_path / "short")
    Serving("torch", max_tokens=6).write(short)
    ask(short)


def test_a_start_token_that_is_no_special_one_is_read_as_transformers_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import AutoModelForSeq2SeqLM

    folder = families.family_checkpoint("t5", tmp_path / "t5", decoder_start_token_id=6)
    Serving("torch").write(folder)
    monkeypatch.setattr(served_engine, "open_worker", InProcess)
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), tokenizer_of(folder)
    ids = torch.tensor([tokenizer("the old river")["input_ids"]])
    found = tokenizer.decode(model.generate(ids, max_new_tokens=6)[0], skip_special_tokens=True)
    assert found.startswith(tokenizer.decode([6]))
    assert Generator(folder, max_tokens=32)(["the old river"], 6) == [found]
