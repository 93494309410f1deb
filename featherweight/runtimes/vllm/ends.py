"""Where vLLM's own server ends a text for users: beside the checkpoint's ends at its tokenizer's; it leaves each of them out."""

from __future__ import annotations

from pathlib import Path

from featherweight.checkpoint.opening import GENERATION, generation_config
from featherweight.checkpoint.tokenizer import left_out, load_tokenizer
from featherweight.model.facts import TokenizerFacts
from featherweight.runtimes.generation_settings import GenerationSettings


def ends_refusal(settings: GenerationSettings, opened: TokenizerFacts) -> str | None:
    """Why its texts end elsewhere than transformers', or are cut by their end; None where they are the same."""
    ends = settings.ends
    if opened.end is not None and opened.end not in ends:
        return (
            f"vLLM's server ends a text at the tokenizer's eos_token too (id {opened.end}), where transformers goes on: "
            f"{GENERATION} does not name it; name it there, or take another engine"
        )
    if plain := [end for end in ends if end not in opened.special]:
        return (
            f"vLLM's server leaves the end of a text out of its answer, and this tokenizer calls token {plain[0]}, which "
            "eos_token_id names, no special one, so that transformers writes it; take another engine, or make it a special token"
        )
    return None


def served_refusal(checkpoint: Path) -> str | None:
    """The same of a checkpoint folder."""
    tokenizer = load_tokenizer(checkpoint)
    opened = TokenizerFacts(end=tokenizer.eos_token_id, special=frozenset(left_out(tokenizer)))
    return ends_refusal(GenerationSettings.read(checkpoint), opened)


def write_ends(checkpoint: Path, folder: Path) -> None:
    """Put the ends that a checkpoint has by its config.json alone where vLLM looks: it would take those that its class assumes."""
    if not (folder / GENERATION).is_file():
        (folder / GENERATION).write_text(generation_config(checkpoint).to_json_string())
