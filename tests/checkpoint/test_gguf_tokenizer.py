"""The tokenizer of a GGUF file: SentencePiece's kind cuts as llama.cpp does, and is proven before the weights are touched."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from featherweight.checkpoint import gguf, tokenizer
from featherweight.checkpoint.gguf_tokenizer import gguf_tokenizer, merges
from featherweight.checkpoint.saving import save_tokenizer
from featherweight.checkpoint.spec import LoadSpec
from featherweight.checkpoint.tokenizer import SAMPLE, load_tokenizer
from featherweight.errors import CheckpointError
from featherweight.progress import Progress
from featherweight.runtimes.llama_cpp.vocabulary import SAMPLES, agrees
from tasks.load import load
from tests.support.gguf_files import write_gguf

TEXTS = (
    *SAMPLE,
    *SAMPLES,
    "the fox in a thing",
    " the  fox   in    a\n\nthing\n\n\n",
    "aab aaab other é ü 😀 中文",
    "<bos>the<eos> <b>fox</b><unk>",
)


def test_pieces_merge_in_the_order_of_their_scores() -> None:
    ids = {piece: number for number, piece in enumerate(["a", "b", "c", "ab", "abc", "bc"])}
    assert list(merges(ids, [0, 0, 0, -2, -3, -1])) == [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")]


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
@pytest.mark.parametrize("space_prefix", [True, False])
def test_sentencepiece_cuts_as_llama_cpp_does(space_prefix: bool, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (file,) = write_gguf(tmp_path / "m.gguf", tiny_checkpoint, space_prefix=space_prefix)
    save_tokenizer(gguf_tokenizer(file), tmp_path / "saved")
    assert agrees(file, tmp_path / "saved", TEXTS)


@pytest.mark.slow
@pytest.mark.parametrize("space_prefix", [True, False])
def test_sentencepiece_stays_as_it_is_when_saved(space_prefix: bool, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (file,) = write_gguf(tmp_path / "m.gguf", tiny_checkpoint, space_prefix=space_prefix)
    made = gguf_tokenizer(file)
    save_tokenizer(made, tmp_path / "saved")
    saved = load_tokenizer(tmp_path / "saved")
    assert [saved(text)["input_ids"] for text in TEXTS] == [made(text)["input_ids"] for text in TEXTS]
    assert (saved.bos_token, saved.eos_token, saved.pad_token, saved.unk_token) == ("<bos>", "<eos>", "<pad>", "<unk>")
    assert saved.decode(saved("the fox", add_special_tokens=False)["input_ids"]) == "the fox"
    assert saved("the")["input_ids"][0] == saved.bos_token_id


def test_a_tokenizer_that_is_lost_is_told_of_the_users_file_before_the_weights(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = write_gguf(tmp_path / "m.gguf", tiny_checkpoint, space_prefix=False)
    other = load_tokenizer(tiny_checkpoint)
    monkeypatch.setattr(tokenizer, "load_tokenizer", lambda *_, **__: other)
    monkeypatch.setattr(gguf, "_read", lambda _: pytest.fail("the weights were read"))
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError) as refused:
        load(LoadSpec(source=str(file)), out=tmp_path / "out", progress=Progress())
    assert str(refused.value).startswith(f"{file}: the saved tokenizer is not the checkpoint's: ")
    assert str(tmp_path / "out") not in str(refused.value)


@pytest.mark.slow
def test_a_checkpoint_with_sentencepiece_is_loaded(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (file,) = write_gguf(tmp_path / "m.gguf", tiny_checkpoint, space_prefix=False)
    (tmp_path / "out").mkdir()
    load(LoadSpec(source=str(file)), out=tmp_path / "out", progress=Progress())
    loaded, given = load_tokenizer(tmp_path / "out"), gguf_tokenizer(file)
    assert all(loaded(text)["input_ids"] == given(text)["input_ids"] for text in TEXTS)
