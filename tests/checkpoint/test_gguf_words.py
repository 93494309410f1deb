"""A GGUF file's byte-level tokenizer cuts texts into words by the name that the file has for it, as llama.cpp does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from featherweight.checkpoint.files import Listing
from featherweight.checkpoint.gguf_faults import require_model
from featherweight.checkpoint.gguf_header import read_gguf
from featherweight.checkpoint.gguf_tokenizer import gguf_tokenizer
from featherweight.checkpoint.gguf_words import CUTS, cut_as_named, cuts_of
from featherweight.checkpoint.saving import save_tokenizer
from featherweight.checkpoint.tokenizer import SAMPLE, load_tokenizer
from featherweight.errors import CheckpointError
from featherweight.runtimes.llama_cpp.vocabulary import SAMPLES, agrees

TEXTS = [
    *(*SAMPLE, *SAMPLES),
    *("In 1984 12345678 x1y22z333 3.14159", "DON'T I'll we'VE 'tis", "a  b   c\n\n\nd \n e\t\tf", "foo_bar(baz)!=q==>{}[];"),
    *("!!!??? ... ---", "  lead", "trail  ", "汉字123汉字 かな12", "x\r\ny\r\n\r\nz", "CamelCaseHTTPServer iPhone", "/a/b//c\\d."),
]
NAMES = [name for names in CUTS for name in names]


@pytest.fixture(scope="module")
def pieces() -> Tokenizer:
    """Byte-level BPE whose pieces go over the borders of words: where those are matters."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False, max_token_length=8
    )
    made.train_from_iterator(TEXTS * 3, trainer)
    return made


def write(path: Path, pieces: Tokenizer, name: str) -> Path:
    """A vocabulary alone, of a Llama, and one tensor."""
    import gguf

    ids = sorted(pieces.get_vocab(), key=pieces.get_vocab().__getitem__)
    writer = gguf.GGUFWriter(path, "llama")
    for key in ("context_length", "embedding_length", "feed_forward_length", "attention.head_count", "block_count"):
        writer.add_uint32(f"llama.{key}", 1 if key in ("attention.head_count", "block_count") else 32)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(ids)
    writer.add_token_types([3 if piece in ("<s>", "</s>") else 1 for piece in ids])
    writer.add_token_merges([" ".join(pair) for pair in _merges(pieces)])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_tensor("output_norm.weight", numpy.ones(32, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _merges(pieces: Tokenizer) -> Iterator[list[str]]:
    yield from json.loads(pieces.to_str())["model"]["merges"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llama-bpe", ["It", "'s", "Ġ", "123", "45", ".ĊĊ", "x"]),
        ("qwen2", ["It", "'s", "Ġ", "1", "2", "3", "4", "5", ".ĊĊ", "x"]),
        ("gpt-2", ["It", "'s", "Ġ12345", ".", "Ċ", "Ċ", "x"]),
        ("smollm", ["It", "'s", "Ġ", "1", "2", "3", "4", "5", ".", "Ċ", "Ċ", "x"]),
        ("tekken", ["It", "'s", "Ġ", "1", "2", "3", "4", "5", ".ĊĊ", "x"]),
    ],
)
def test_words_are_those_of_the_name(name: str, words: list[str], pieces: Tokenizer) -> None:
    made = Tokenizer.from_str(pieces.to_str())
    cut_as_named(made, name)
    assert [word for word, _ in made.pre_tokenizer.pre_tokenize_str("It's 12345.\n\nx")] == words
    assert made.model.ignore_merges == (name in ("llama-bpe", "tekken"))


def test_a_file_is_cut_as_it_says_and_stays_so_when_saved(pieces: Tokenizer, tmp_path: Path) -> None:
    made = gguf_tokenizer(write(tmp_path / "m.gguf", pieces, "llama-bpe"))
    save_tokenizer(made, tmp_path / "saved")
    saved = load_tokenizer(tmp_path / "saved")
    other = gguf_tokenizer(write(tmp_path / "other.gguf", pieces, "smollm"))
    assert [saved(text)["input_ids"] for text in TEXTS] == [made(text)["input_ids"] for text in TEXTS]
    assert [other(text)["input_ids"] for text in TEXTS] != [made(text)["input_ids"] for text in TEXTS]
    assert all(saved.decode(saved(text, add_special_tokens=False)["input_ids"]) == text for text in TEXTS)


def test_a_name_that_nobody_knows_is_refused(pieces: Tokenizer, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", pieces, "mystery")
    assert cuts_of("mystery") is None
    with pytest.raises(CheckpointError, match=r"into words as 'mystery' does \(tokenizer\.ggml\.pre\), which neither"):
        require_model(read_gguf(Listing.of(tmp_path), "m.gguf"), "m.gguf")


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.skipif(find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
@pytest.mark.parametrize("name", NAMES)
def test_every_name_cuts_as_llama_cpp_does(name: str, pieces: Tokenizer, tmp_path: Path) -> None:
    file = write(tmp_path / "m.gguf", pieces, name)
    save_tokenizer(gguf_tokenizer(file), tmp_path / "saved")
    assert agrees(file, tmp_path / "saved", TEXTS)
