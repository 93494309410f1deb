"""A checkpoint's tokenizer as llama.cpp reads it, and whether it cuts texts into the same ids.

The served model is given ids, so that nothing here changes what it answers; the file's tokenizer is for those who open it with
another llama.cpp.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.files import CONFIG
from featherweight.checkpoint.pieces import Pieces
from featherweight.checkpoint.tokenizer import load_tokenizer
from featherweight.runtimes.llama_cpp import library

if TYPE_CHECKING:
    from gguf import GGUFWriter

SAMPLES = (
    "The quick brown fox jumps over 13 lazy dogs, and it's 9:45!",
    "  two spaces\n\n\nthree lines\tand a tab ",
    "Größe, naïve café, 日本語のテキスト, русский, 😀👍🏽",
    "def f(x):\n    return {'a': x ** 2, 'b': [1_000, 3.14]}  # DON'T\r\n",
)
SENTENCEPIECE, BYTES = "llama", "gpt2"
SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
PREPARED = ("default", "llama-bpe", "qwen2", "smollm", "gpt-2", "llama3", "tekken")
"""llama.cpp's names of the ways to cut a text before its pieces are merged; the first that agrees with transformers is taken."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class Vocabulary:
    """What of a tokenizer's folder GGUF can say; `kind` is None where it cannot."""

    def __init__(self, checkpoint: Path, rows: int) -> None:
        self.checkpoint, self.rows = checkpoint, rows
        file = checkpoint / "tokenizer.json"
        self.told: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        model = self.told.get("model", {})
        pieces = Pieces(self.told)
        bytes_beside = model.get("type") == "BPE" and pieces.falls_back_to_bytes and not pieces.byte_level
        self.kind = SENTENCEPIECE if bytes_beside else BYTES if model.get("type") == "BPE" else None

    @property
    def ways(self) -> tuple[str, ...]:
        """llama.cpp's names of the ways in which it may cut a text into words first; of SentencePiece's there is one."""
        return PREPARED if self.kind == BYTES else PREPARED[:1] if self.kind else ()

    def write(self, writer: GGUFWriter, prepared: str) -> None:
        """Its pieces, their types, scores or merges, special tokens and chat template."""
        from gguf import SpecialVocab

        if self.kind is None:
            writer.add_tokenizer_model("none")
            return
        writer.add_tokenizer_model(self.kind)
        writer.add_tokenizer_pre(prepared)
        pieces, types = self._pieces()
        writer.add_token_list(pieces)
        writer.add_token_types(types)
        if self.kind == SENTENCEPIECE:
            writer.add_token_scores(self._scores(pieces))
            writer.add_add_space_prefix('"Prepend"' in json.dumps(self.told.get("normalizer")))
        logging.getLogger("gguf.vocab").setLevel(logging.ERROR)  # it warns of templates that it does not follow
        special = SpecialVocab(self.checkpoint, self.kind == BYTES, self._special(), self.rows)
        special.add_to_gguf(writer, quiet=True)

    def _special(self) -> list[str]:
        """The kinds of special tokens of which `gguf` is to look for one: it stops at the -1 that stands for none."""
        told = json.loads((self.checkpoint / CONFIG).read_text(encoding="utf-8"))
        ids = {kind: told.get(f"{kind}_token_id") for kind in SPECIAL}
        return [kind for kind, number in ids.items() if not isinstance(number, int) or number >= 0]

    def _pieces(self) -> tuple[list[str], list[int]]:
        """Text and type of each row of the embedding; rows without a token are named and never written."""
        from gguf import TokenType

        added = {one["id"]: one for one in self.told.get("added_tokens", [])}
        known = {number: piece for piece, number in self.told["model"]["vocab"].items()}
        known |= {number: one["content"] for number, one in added.items()}
        pieces, types = [], []
        for number in range(self.rows):
            piece = known.get(number)
            kind = TokenType.UNUSED if piece is None else TokenType.NORMAL
            if number in added:
                kind = TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED
            elif piece and self.kind == SENTENCEPIECE and _BYTE.fullmatch(piece):
                kind = TokenType.BYTE
            if piece is not None and piece == self.told["model"].get("unk_token"):
                kind = TokenType.UNKNOWN
            pieces.append(f"[PAD{number}]" if piece is None else piece)
            types.append(int(kind))
        return pieces, types

    def _scores(self, pieces: list[str]) -> list[float]:
        """llama.cpp merges what has the highest score first: what is merged first has the highest."""
        rank: dict[str, int] = {}
        for place, merge in enumerate(self.told["model"]["merges"]):
            rank.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), place)
        return [-float(rank.get(piece, len(rank))) for piece in pieces]


def agrees(file: Path, checkpoint: Path, texts: Iterable[str] = ()) -> bool:
    """Whether llama.cpp cuts the samples, and `texts`, into the ids that transformers cuts them into."""
    model = library.load_model(file, vocab_only=True)
    if not model:
        return False
    tokenizer = load_tokenizer(checkpoint)
    try:
        vocabulary = library.library().llama_model_get_vocab(model)
        return all(_cut(vocabulary, text) == tokenizer.encode(text, add_special_tokens=False) for text in (*SAMPLES, *texts))
    finally:
        library.library().llama_model_free(model)


def _cut(vocabulary: int, text: str) -> list[int]:
    import ctypes

    content = text.encode()
    ids = (ctypes.c_int32 * (len(content) + 16))()
    count = library.library().llama_tokenize(vocabulary, content, len(content), ids, len(ids), False, True)
    return list(ids[:count])
