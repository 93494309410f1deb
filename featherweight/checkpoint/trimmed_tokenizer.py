"""A checkpoint's companions for a model that has lost tokens: its tokenizer without them, and every id at its new place."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.files import (
    CONFIG,
    TOKENIZER_CONFIG,
    VOCABULARIES,
    Listing,
    companions,
    copy,
    is_companion,
    read_json,
)
from featherweight.checkpoint.pieces import Pieces
from featherweight.checkpoint.token_ids import token_ids, with_places
from featherweight.checkpoint.tokenizer import SAMPLE, load_tokenizer
from featherweight.errors import StageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEPT = "kept_tokens.json"
"""What the trimmed checkpoint was made of: the id that each of its tokens had, and how many there were."""
SPELT = (*VOCABULARIES, "merges.txt", "bpe.codes", "added_tokens.json", "target.spm", "target_vocab.json", "vocab-tgt.json", KEPT)
"""Companions that hold pieces; in their place there is one tokenizer.json."""
FIRST = 16
"""Padding's id stays, where it is among so many, since some models count their positions from it."""


@dataclass(frozen=True)
class Trimmer:
    """The tokenizer of a checkpoint folder, as far as it can be trimmed."""

    checkpoint: Path
    tokenizer: PreTrainedTokenizerBase
    pieces: Pieces

    @classmethod
    def of(cls, checkpoint: Path) -> Trimmer:
        """Raises StageError, naming its class, for a tokenizer whose files are not trimmed here."""
        tokenizer: Any = load_tokenizer(checkpoint)
        if not tokenizer.is_fast:
            raise StageError(
                f"{type(tokenizer).__name__} reads vocabulary files of its own, which are not trimmed here; leave the stage "
                "out, or give the checkpoint a tokenizer.json"
            )
        return cls(checkpoint, tokenizer, Pieces.of(json.loads(tokenizer.backend_tokenizer.to_str())))

    @cached_property
    def settings(self) -> dict[str, dict[str, Any]]:
        """The companions in JSON that may hold ids, by name, and the model's own configuration."""
        listing = Listing.of(self.checkpoint)
        wanted = (CONFIG, "generation_config.json", TOKENIZER_CONFIG)
        return {name: read_json(listing, name) for name in wanted if name in listing.sizes}

    def kept(self, wanted: Iterable[int], rows: int, *, characters: bool) -> list[int]:
        """The ids of `rows` that stay for the `wanted` ones, rising: see Pieces.closed; and those that settings name."""
        named = {one for told in self.settings.values() for one in token_ids(told)} | set(self.tokenizer.all_special_ids)
        padding = self.settings[CONFIG].get("pad_token_id")
        first = range(padding + 1) if isinstance(padding, int) and padding < FIRST else ()
        kept = self.pieces.closed({*wanted, *named, *first}, characters=characters)
        return [one for one in kept if 0 <= one < rows]

    def write(self, kept: Sequence[int], rows: int, out: Path) -> None:
        """The companions to `out`, which has a config.json already."""
        places = {old: new for new, old in enumerate(kept)}
        for name in companions(Listing.of(self.checkpoint).sizes):
            if is_companion(name, SPELT):
                continue
            if name in self.settings:
                _write(out / name, with_places(self.settings[name], places))
            else:
                copy(self.checkpoint / name, out / name)
        _write(out / "tokenizer.json", self.pieces.without(list(kept)))
        _write(out / KEPT, {"kept": list(kept), "of": rows})

    def require_kept(self, kept: Sequence[int], out: Path, texts: Iterable[str]) -> None:
        """Raise StageError unless the tokenizer in `out` cuts texts of kept tokens as before, and knows what was known."""
        trimmed: Any = load_tokenizer(out)
        places = {old: new for new, old in enumerate(kept)}
        if {piece: places[one] for piece, one in self.tokenizer.get_vocab().items() if one in places} != trimmed.get_vocab():
            raise StageError(
                f"{out}: the trimmed tokenizer gives its tokens other ids than those of the embedding; leave the stage out"
            )
        for text in (*SAMPLE, *texts):
            before, after = (one(text, verbose=False)["input_ids"] for one in (self.tokenizer, trimmed))
            if all(one in places for one in before):
                if [places[one] for one in before] != after:
                    raise StageError(f"the trimmed tokenizer cuts {text[:40]!r} otherwise, though every piece of it was kept")
            elif after.count(trimmed.unk_token_id) > before.count(self.tokenizer.unk_token_id):
                raise StageError(f"the trimmed tokenizer does not know what stands in {text[:40]!r}, and the checkpoint's does")


def _write(path: Path, told: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(told, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
