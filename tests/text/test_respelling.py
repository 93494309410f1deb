"""The same text in the tokens of a trimmed tokenizer: the same bytes, the same tokens where they stay, smaller ones where not."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from featherweight.checkpoint.pieces import Pieces
from featherweight.text.examples import Example
from featherweight.text.respelling import Respelling
from featherweight.text.tokens import Window
from tests.support import tokenizers as small


def trimmed(tokenizer: Any, kept_text: str) -> Any:
    """A tokenizer with the tokens of a text alone."""
    from tokenizers import Tokenizer

    pieces = Pieces.of(json.loads(tokenizer.backend_tokenizer.to_str()))
    raw = Tokenizer.from_str(json.dumps(pieces.without(pieces.closed(tokenizer(kept_text)["input_ids"]))))
    return type(tokenizer)(tokenizer_object=raw, **small.ENDS)


@pytest.fixture(scope="module")
def byte_level() -> Respelling:
    tokenizer = small.byte_level("<s> $A")
    return Respelling(tokenizer, trimmed(tokenizer, "The stone."))


def test_a_token_that_stays_has_one_id_and_one_that_went_is_spelt_in_others(byte_level: Respelling) -> None:
    ids = byte_level.source("The river and the stone.")["input_ids"]
    respelt = byte_level.all(ids)
    assert byte_level.target.decode(respelt) == byte_level.source.decode(ids)
    assert byte_level.target("The stone.")["input_ids"] == byte_level.all(byte_level.source("The stone.")["input_ids"])
    assert len(respelt) > len(ids)
    assert [respelt[place] for place in byte_level.firsts(ids)] == [byte_level.tokens(one)[0] for one in ids]


def test_a_window_that_becomes_too_long_is_scored_in_several_that_begin_alike(byte_level: Respelling) -> None:
    ids = byte_level.source("The river and the stone.")["input_ids"]
    whole = byte_level.all(ids)
    parts = byte_level.windows(Window(ids, 24), "causal", 8)
    assert [part.text_bytes for part in parts] == [24, *(0 for _ in parts[1:])]
    assert all(len(part.ids) <= 8 and part.ids[0] == whole[0] for part in parts)
    assert [one for part in parts for one in part.ids[1:]] == whole[1:]
    (one,) = byte_level.windows(Window(ids, 24), "causal", 100)
    assert one == Window(whole, 24)


def test_without_a_frame_a_part_begins_with_the_token_before_it(byte_level: Respelling) -> None:
    ids = byte_level.source("The river and the stone.", add_special_tokens=False)["input_ids"]
    whole = byte_level.all(ids)
    parts = byte_level.windows(Window(ids, 24), "causal", 8)
    assert [one for part in parts for one in part.ids[1:]] == whole[1:]
    assert all(before.ids[-1] == after.ids[0] for before, after in pairwise(parts))


def test_a_masked_token_is_masked_wherever_it_is_spelt() -> None:
    tokenizer = small.wordpiece("<s> $A </s>")
    respelling = Respelling(tokenizer, trimmed(tokenizer, "the"))
    ids = tokenizer("the river thea")["input_ids"]
    assert "river" in tokenizer.convert_ids_to_tokens(ids)
    place, mask = tokenizer.convert_ids_to_tokens(ids).index("river"), tokenizer.mask_token_id
    source = [mask if at == place else one for at, one in enumerate(ids)]
    (window,) = respelling.windows(Window(ids, 5, source), "encoder", 100)
    hidden = [one for one, read in zip(window.ids, window.source, strict=True) if one != read]
    assert respelling.target.convert_ids_to_tokens(hidden) == ["r", "##i", "##v", "##e", "##r"]
    parts = respelling.windows(Window(ids, 5, source), "encoder", 6)
    assert len(parts) > 1
    assert all(part.ids[0] == window.ids[0] and part.ids[-1] == window.ids[-1] and len(part.ids) <= 6 for part in parts)
    assert [one for part in parts for one, read in zip(part.ids, part.source, strict=True) if one != read] == hidden


def test_a_piece_in_the_middle_of_a_word_stays_there() -> None:
    tokenizer = small.wordpiece()
    respelling = Respelling(tokenizer, trimmed(tokenizer, "a"))
    assert respelling.target.convert_ids_to_tokens(respelling.tokens(tokenizer.convert_tokens_to_ids("##er"))) == ["##e", "##r"]


def test_an_example_is_cut_at_its_end_and_says_of_each_token_which_text_it_is_of(byte_level: Respelling) -> None:
    ids = byte_level.source("The river stone.")["input_ids"]
    (one,) = byte_level.windows(Example(ids, 16, types=list(range(len(ids)))), "encoder", 6)
    assert isinstance(one, Example)
    assert len(one.ids) == len(one.types) == 6
    assert one.ids[-1] == byte_level.all(ids)[-1]
    assert one.types == sorted(one.types)


def test_the_same_tokenizer_and_none_need_no_respelling(tmp_path: Path) -> None:
    for name in ("one", "other", "none"):
        (tmp_path / name).mkdir()
    small.byte_level().save_pretrained(tmp_path / "one")
    small.byte_level().save_pretrained(tmp_path / "other")
    assert Respelling.between(tmp_path / "one", tmp_path / "other") is None
    assert Respelling.between(tmp_path / "one", tmp_path / "none") is None
