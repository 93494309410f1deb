"""Checkpoints whose tokenizers come as people have them: the vocabulary files of their class, and no tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.families import WORDS, tiny_model

TEXT = " ".join(WORDS.split())
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")


def _sentencepiece(path: Path, **ids: int) -> list[str]:
    """Train a SentencePiece model on the words; returns its pieces in order."""
    import sentencepiece

    lines = path.with_suffix(".txt")
    lines.write_text("\n".join([TEXT, *WORDS.split(), "Käse über Ærø: 中文 日本 3.14 😀!"] * 8))
    options = {"vocab_size": 110, "hard_vocab_limit": False, "character_coverage": 1.0, "minloglevel": 2} | ids
    sentencepiece.SentencePieceTrainer.train(input=str(lines), model_prefix=str(path.with_suffix("")), **options)
    path.with_suffix(".model").rename(path)
    path.with_suffix(".vocab").unlink()
    lines.unlink()
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return [model.id_to_piece(place) for place in range(len(model))]


def _t5(folder: Path) -> dict[str, Any]:
    _sentencepiece(folder / "spiece.model", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    return {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "extra_ids": 10}


def _mbart(folder: Path) -> dict[str, Any]:
    _sentencepiece(folder / "sentencepiece.bpe.model", unk_id=0, bos_id=1, eos_id=2)
    return {"tokenizer_class": "MBartTokenizer", "src_lang": "en_XX", "tgt_lang": "de_DE"}


def _vocabulary(path: Path, pieces: list[str]) -> None:
    path.write_text(json.dumps({piece: place for place, piece in enumerate(dict.fromkeys([*SPECIALS, *pieces]))}))


def _m2m_100(folder: Path) -> dict[str, Any]:
    _vocabulary(folder / "vocab.json", _sentencepiece(folder / "sentencepiece.bpe.model", unk_id=0, bos_id=1, eos_id=2))
    return {"tokenizer_class": "M2M100Tokenizer", "src_lang": "en", "tgt_lang": "de"}


def _marian(folder: Path) -> dict[str, Any]:
    pieces = _sentencepiece(folder / "source.spm", unk_id=0, bos_id=1, eos_id=2)
    pieces += _sentencepiece(folder / "target.spm", unk_id=0, bos_id=1, eos_id=2, model_type="bpe")
    _vocabulary(folder / "vocab.json", pieces)
    return {"tokenizer_class": "MarianTokenizer", "source_lang": "en", "target_lang": "de"}


def _bert(folder: Path) -> dict[str, Any]:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys([*WORDS.split(), *"abcdefghijklmnopqrstuvwxyz"])]
    (folder / "vocab.txt").write_text("\n".join([*pieces, *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz")]))
    return {"tokenizer_class": "BertTokenizer", "do_lower_case": True}


def _gpt2(folder: Path) -> dict[str, Any]:
    from tokenizers import ByteLevelBPETokenizer

    inner = ByteLevelBPETokenizer()
    inner.train_from_iterator([TEXT] * 4, vocab_size=320, special_tokens=["<|endoftext|>"], show_progress=False)
    inner.save_model(str(folder))
    return {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}


KINDS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "t5": _t5,
    "mbart": _mbart,
    "m2m_100": _m2m_100,
    "marian": _marian,
    "bert": _bert,
    "gpt2": _gpt2,
}


def slow_checkpoint(kind: str, folder: Path, **changes: Any) -> Path:
    """A tiny random `kind` in `folder` with its tokenizer's own files; there is no tokenizer.json."""
    from transformers import AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_model(kind, vocab_size=400, **changes)
    model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(KINDS[kind](folder)))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert not (folder / "tokenizer.json").exists()
    assert len(tokenizer) <= 400
    return folder
