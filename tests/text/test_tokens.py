"""Windows of tokens: the bytes that they count, and how the tokenizer begins and ends them."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.text.documents import Document, write_documents
from featherweight.text.model_inputs import scoring_windows
from featherweight.text.tokens import Frame, encode, token_blocks, token_windows
from tests.support import tokenizers
from tests.support.families import tiny_model

TOKENIZERS: dict[str, Callable[[], Any]] = {
    "gpt2": tokenizers.byte_level,
    "gpt2-trimmed": lambda: tokenizers.byte_level(trimmed=True),
    "llama3": lambda: tokenizers.byte_level("<s> $A"),
    "llama2": tokenizers.sentencepiece,
    "closed": lambda: tokenizers.sentencepiece("<s> $A </s>"),
    "bert": tokenizers.wordpiece,
    "t5": tokenizers.unigram,
    "byt5": tokenizers.without_offsets,
}
DICE = random.Random(3)
TEXTS = {
    "chinese": "".join(chr(DICE.randint(0x4E00, 0x9FA5)) for _ in range(600)),
    "emoji": "".join(chr(DICE.randint(0x1F600, 0x1F64F)) for _ in range(300)),
    "families": "👩‍👩‍👧‍👦🏳️‍🌈👍🏽 " * 40,
    "arabic": "مرحبا بالعالم، كيف حالك اليوم؟ " * 20,
    "mixed": "The river, 漢字 and 🙂: ﬁne  Zoë\n\n\tÅ e\u0301 ½ <s> x\u00a0y " * 20,
}
LETTERS = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from("the river 漢字🙂\u200d\u0301ﬁ \n")), min_size=1, max_size=80
)


@cache
def made(name: str) -> Any:
    return TOKENIZERS[name]()


def windows_of(name: str, text: str, length: int, shortest: int = 2) -> list[Any]:
    with TemporaryDirectory() as folder:
        write_documents(Path(folder), [Document("a", text)])
        return token_windows(Path(folder), made(name), length, 10_000, shortest)


def size(text: str) -> int:
    return len(text.encode())


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("length", [7, 16, 63, 256])
@pytest.mark.parametrize("text", TEXTS)
def test_the_windows_of_a_document_count_its_bytes_once(name: str, text: str, length: int) -> None:
    windows, document = windows_of(name, TEXTS[text], length), encode(made(name), TEXTS[text], add_special_tokens=False)
    unscored = 0 if Frame.of(made(name)).lead else document.sizes[0]
    dropped = 0  # a last piece of one token, which has nothing to be scored by
    scored = sum(len(window.ids) - max(1, len(Frame.of(made(name)).lead)) for window in windows)
    tokens = len(document.ids) + len(Frame.of(made(name)).tail) - (not Frame.of(made(name)).lead)
    if scored < tokens:
        dropped = sum(document.sizes[-(tokens - scored) :])
    assert sum(window.text_bytes for window in windows) == size(TEXTS[text]) - unscored - dropped
    assert tokens - scored <= 1


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(TOKENIZERS)), LETTERS)
def test_tokens_share_out_the_bytes_of_any_text(name: str, text: str) -> None:
    encoded = encode(made(name), text)
    assert all(part >= 0 for part in encoded.sizes)
    real = encoded.offsets is None or any(end > start for start, end in encoded.offsets)
    assert sum(encoded.sizes) == (size(text) if real else 0)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["gpt2", "llama3"]), LETTERS)
def test_a_byte_level_token_counts_the_bytes_that_it_spells(name: str, text: str) -> None:
    encoded = encode(made(name), text, add_special_tokens=False)
    spelt = [size(piece) if piece in tokenizers.SPECIAL else len(piece) for piece in encoded.pieces]
    assert encoded.sizes == spelt


@settings(max_examples=100, deadline=None)
@given(LETTERS)
def test_a_byte_token_counts_one_byte(text: str) -> None:
    encoded = encode(made("llama2"), text)
    assert {part for part, piece in zip(encoded.sizes, encoded.pieces, strict=True) if piece.startswith("<0x")} <= {1}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_window_begins_as_the_tokenizer_begins_a_text(name: str) -> None:
    tokenizer, text = made(name), TEXTS["arabic"]
    lead = Frame.of(tokenizer).lead
    whole = tokenizer(text, verbose=False)["input_ids"]
    assert whole[: len(lead)] == lead
    windows = windows_of(name, text, 32)
    assert windows[0].ids == whole[:32]
    body = 32 - len(lead) if lead else 31
    for number, window in enumerate(windows):
        start = len(lead) + number * body
        assert window.ids == [*lead, *whole[start : start + 32 - len(lead)]]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_blocks_are_texts_as_the_tokenizer_frames_them(tmp_path: Path, name: str) -> None:
    texts = ["the river", "and the stone"]
    write_documents(tmp_path, [Document(str(place), text) for place, text in enumerate(texts)])
    packed = [token for text in texts for token in made(name)(text)["input_ids"]]
    assert token_blocks(tmp_path, made(name), len(packed)).tolist() == [packed]


def checkpoint(kind: str, tokenizer: Any, folder: Path) -> Any:
    model = tiny_model(kind, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    return model.config


@pytest.mark.parametrize(("kind", "name"), [("t5", "t5"), ("t5", "gpt2"), ("bert", "bert"), ("bert", "closed")])
def test_masked_tokens_and_targets_count_their_own_bytes(tmp_path: Path, kind: str, name: str) -> None:
    """All bytes of the scored tokens, and of no other: over both halves, or over masked and unmasked, they are the text's."""
    text = TEXTS["mixed"]
    write_documents(tmp_path / "text", [Document("a", text)])
    config = checkpoint(kind, made(name), tmp_path / "model")
    windows = scoring_windows(tmp_path / "model", config, tmp_path / "text", 40, 1000)
    document, place = encode(made(name), text, add_special_tokens=False), 0
    lead, tail = len(Frame.of(made(name)).lead), len(Frame.of(made(name)).tail)
    for window in windows:
        if kind == "t5":
            place += len(window.source)
            body, wanted = window.ids[1:], [True] * (len(window.ids) - 1)
        else:
            body = window.ids[lead : len(window.ids) - tail]
            wanted = [a != b for a, b in zip(window.ids, window.source, strict=True)][lead : len(window.ids) - tail]
        assert body == document.ids[place : place + len(body)]
        sizes = document.sizes[place : place + len(body)]
        assert window.text_bytes == sum(size for size, scored in zip(sizes, wanted, strict=True) if scored)
        place += len(body)


def test_a_target_of_its_own_counts_all_of_its_bytes(tmp_path: Path) -> None:
    write_documents(tmp_path / "text", [Document("a", "the stone", "ﬁne  漢字 🙂 ")])
    config = checkpoint("t5", made("t5"), tmp_path / "model")
    (window,) = scoring_windows(tmp_path / "model", config, tmp_path / "text", 64, 10)
    assert window.text_bytes == size("ﬁne  漢字 🙂 ")
    assert window.ids[-1] == made("t5").eos_token_id
