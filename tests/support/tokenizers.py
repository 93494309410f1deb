"""Tokenizers of every kind, small: byte-level BPE, SentencePiece with byte fallback, WordPiece, and one without offsets."""

from __future__ import annotations

from typing import Any

TEXT = "The river and the stone. 漢字 des Königs 🙂 مرحبا "
ENDS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"}
SPECIAL = list(ENDS.values())


def fast(raw: Any, frame: str = "$A") -> Any:
    """A tokenizer of transformers; `frame` says what it puts around every text, such as '<s> $A </s>'."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    ends = [(token, raw.token_to_id(token)) for token in SPECIAL]
    template = processors.TemplateProcessing(single=frame, special_tokens=ends)
    raw.post_processor = processors.Sequence([raw.post_processor, template]) if raw.post_processor else template
    return PreTrainedTokenizerFast(tokenizer_object=raw, **ENDS)


def byte_level(frame: str = "$A", trimmed: bool = False) -> Any:
    """As GPT-2's and Llama 3's: tokens are bytes and merges of them, so that one may be a part of a character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.ByteLevel(trim_offsets=trimmed)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator([TEXT * 3], trainer)
    return fast(raw, frame)


def sentencepiece(frame: str = "<s> $A") -> Any:
    """As Llama 2's: a space is a mark in front of a word, and characters that it lacks are tokens of one byte."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *dict.fromkeys("The river and stone.漢")]
    pieces = list(dict.fromkeys([*pieces, "▁t", "he", "▁the"]))
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    raw = Tokenizer(models.BPE({piece: place for place, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return fast(raw, frame)


def wordpiece(frame: str = "<s> $A </s>") -> Any:
    """As BERT's: small letters without accents, white space dropped, unknown words one token."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    letters = "abcdefghijklmnopqrstuvwxyz.,漢字"
    pieces = dict.fromkeys([*SPECIAL, *letters, *(f"##{letter}" for letter in letters), "the", "river", "##er"])
    raw = Tokenizer(models.WordPiece({piece: place for place, piece in enumerate(pieces)}, unk_token="<unk>"))
    raw.normalizer = normalizers.BertNormalizer()
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return fast(raw, frame)


def unigram(frame: str = "$A </s>") -> Any:
    """As T5's: compatibility forms made one (NFKC), runs of spaces too."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    letters = [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz.,漢字T"]
    pieces = [*((token, 0.0) for token in SPECIAL), ("▁", -3.0), ("▁the", -2.0), ("river", -2.0), *letters]
    raw = Tokenizer(models.Unigram(pieces, unk_id=SPECIAL.index("<unk>")))
    raw.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    return fast(raw, frame)


def without_offsets() -> Any:
    """One of Python's own, which does not say where a token stands in the text: a token a byte, as ByT5's."""
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()
