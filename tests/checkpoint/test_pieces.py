"""A tokenizer without some of its pieces: text of the others is cut as before, and nothing is unknown that was not."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.checkpoint.pieces import Pieces, merging
from featherweight.errors import StageError
from tests.support import tokenizers as small

TEXTS = st.text("abcdxq Tehriv.漢é\nThe🙂", max_size=24)


def unigram_with_bound_characters() -> Any:
    """`x` has no piece of its own, so that `xd` and with it `d` stay; `z` neither, and is rarest."""
    from tokenizers import Tokenizer, models

    letters = [(one, -4.0) for one in "abcd"]
    pieces = [("<unk>", 0.0), ("▁", -3.0), *letters, ("ab", -5.0), ("bc", -5.5), ("abc", -7.0), ("xd", -6.0), ("zz", -20.0)]
    return Tokenizer(models.Unigram(pieces, unk_id=0))


def wordpiece_with_bound_characters() -> Any:
    """`q` stands inside of words only together with `b`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    pieces = ["[UNK]", *"abcdq", *(f"##{one}" for one in "abcd"), "ab", "##bc", "##bq", "abc", "##cd"]
    raw = Tokenizer(models.WordPiece({piece: place for place, piece in enumerate(pieces)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return raw


def nested_merges() -> Any:
    """`abcd` comes by way of `ab` and `cd`, though `bc` and `abc` are pieces too."""
    from tokenizers import Tokenizer, models

    merges = [("a", "b"), ("c", "d"), ("b", "c"), ("ab", "cd"), ("ab", "c"), ("d", "a")]
    pieces = dict.fromkeys(["<unk>", *"abcdx ", *("".join(pair) for pair in merges)])
    return Tokenizer(models.BPE({piece: place for place, piece in enumerate(pieces)}, merges, unk_token="<unk>"))


KINDS = {
    "byte-level": lambda: small.byte_level().backend_tokenizer,
    "bytes behind": lambda: small.sentencepiece().backend_tokenizer,
    "merges": nested_merges,
    "wordpiece": lambda: small.wordpiece().backend_tokenizer,
    "bound wordpiece": wordpiece_with_bound_characters,
    "unigram": lambda: small.unigram().backend_tokenizer,
    "bound unigram": unigram_with_bound_characters,
}


@cache
def made(kind: str) -> tuple[Any, Pieces]:
    raw = KINDS[kind]()
    return raw, Pieces.of(json.loads(raw.to_str()))


def trimmed(raw: Any, pieces: Pieces, kept_text: str, **options: Any) -> tuple[Any, list[int]]:
    """The tokenizer that knows the tokens of `kept_text` and those that it needs for them."""
    from tokenizers import Tokenizer

    kept = pieces.closed(raw.encode(kept_text).ids, **options)
    return Tokenizer.from_str(json.dumps(pieces.without(kept))), kept


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(kept_text=TEXTS, other=TEXTS)
def test_text_of_kept_tokens_is_cut_as_before_and_nothing_more_is_unknown(kind: str, kept_text: str, other: str) -> None:
    raw, pieces = made(kind)
    small_one, kept = trimmed(raw, pieces, kept_text)
    assert [kept[one] for one in small_one.encode(kept_text).ids] == raw.encode(kept_text).ids
    before, after = raw.encode(other), small_one.encode(other)
    if set(before.ids) <= set(kept):
        assert after.tokens == before.tokens
    unknown = {"<unk>", "[UNK]"}
    if not unknown & set(before.tokens):
        assert not unknown & set(after.tokens)
    assert spelt(after.tokens) == spelt(before.tokens)


def spelt(tokens: list[str]) -> str:
    """What the tokens stand for; a byte that stands for itself is a part of the character that it belongs to."""
    found = b"".join(bytes([int(one[3:5], 16)]) if one.startswith("<0x") else one.removeprefix("##").encode() for one in tokens)
    return found.decode()


@pytest.mark.parametrize(
    ("kind", "gone"),
    [("byte-level", "Ġriver"), ("merges", "bc"), ("bound unigram", "abc"), ("unigram", "river")],
)
def test_what_no_kept_text_needs_goes(kind: str, gone: str) -> None:
    small_one, kept = trimmed(*made(kind), "abcd" if kind == "merges" else "ab")
    assert small_one.token_to_id(gone) is None
    assert small_one.get_vocab_size() == len(kept)


def test_a_piece_is_kept_with_what_its_merges_pass_through_and_no_more() -> None:
    small_one, _ = trimmed(*made("merges"), "abcd")
    assert {"ab", "cd", "abcd"} <= small_one.get_vocab().keys()
    assert json.loads(small_one.to_str())["model"]["merges"] == [["a", "b"], ["c", "d"], ["ab", "cd"]]


def test_merges_are_taken_by_rank_and_from_the_left() -> None:
    assert list(merging("aaab", {("a", "a"): 1, ("a", "b"): 0})) == [("a", "a", "ab"), ("aa", "ab")]


def test_characters_may_be_left_to_the_bytes_where_there_are_bytes() -> None:
    small_one, _ = trimmed(*made("bytes behind"), "The", characters=False)
    assert small_one.token_to_id("漢") is None
    assert small_one.encode("漢").tokens == ["<s>", "▁", "<0xE6>", "<0xBC>", "<0xA2>"]
    with pytest.raises(StageError, match="characters: all"):
        trimmed(*made("unigram"), "the", characters=False)


def test_tokenizers_that_need_all_of_their_pieces_are_refused() -> None:
    with pytest.raises(StageError, match="WordLevel cannot do without"):
        Pieces.of({"model": {"type": "WordLevel", "vocab": {}}})
    with pytest.raises(StageError, match="end_of_word_suffix"):
        Pieces.of({"model": {"type": "BPE", "vocab": {}, "merges": [], "end_of_word_suffix": "</w>"}})


def test_what_frames_texts_and_pads_them_has_its_new_ids() -> None:
    raw = small.wordpiece("<s> $A </s>").backend_tokenizer
    raw.enable_padding(pad_id=3, pad_token="<pad>")
    small_one, kept = trimmed(raw, Pieces.of(json.loads(raw.to_str())), "a")
    told = json.loads(small_one.to_str())
    assert [kept[one] for one in small_one.encode("a").ids] == raw.encode("a").ids
    assert kept[told["padding"]["pad_id"]] == 3
