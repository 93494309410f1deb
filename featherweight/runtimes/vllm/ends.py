"""Where vLLM's own server ends a text for users: beside the checkpoint's ends at its tokenizer's; it leaves each of them out."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from featherweight.checkpoint.opening import GENERATION, generation_config
from featherweight.checkpoint.tokenizer import left_out, load_tokenizer

STARTED_BY = Path(__file__).with_name("own_ends.py")
"""What starts its server otherwise."""


def other_ends(served: Path, ends: Iterable[int]) -> str | None:
    """What its texts end with otherwise than transformers' do, which end at `ends`, in a clause; None where they are the same."""
    tokenizer = load_tokenizer(served)
    end: int | None = tokenizer.eos_token_id
    if end is not None and end not in ends:
        return f"ends a text at the tokenizer's eos_token too (id {end}), which {GENERATION} does not name"
    plain = sorted(set(ends).difference(left_out(tokenizer)))
    return f"leaves token {plain[0]} out of an answer, an end by {GENERATION} that is no special token" if plain else None


def write_ends(checkpoint: Path, folder: Path) -> None:
    """Put the ends that a checkpoint has by its config.json alone where vLLM looks: it would take those that its class assumes."""
    if not (folder / GENERATION).is_file():
        (folder / GENERATION).write_text(generation_config(checkpoint).to_json_string())
