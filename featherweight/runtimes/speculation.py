"""Speculative decoding: the next tokens are drafted, and the model accepts, in one pass, those that it would have written itself.

Whatever is drafted, the text is the model's own; a token that is not accepted costs its share of the pass. What a recipe says of
it, how a served folder keeps it, and drafts by what stood in the text before (prompt look-up).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from featherweight.spec import Spec

OPTION = "speculation"
"""The option of a served folder that holds it."""
DRAFT = "draft"
"""The folder in a served one that holds the model that drafts."""


class SpeculationSpec(Spec):
    """How the next tokens are drafted. method: ngram drafts what followed the last `ngram_size` tokens where they stood before;
    with draft a smaller model drafts, `draft`, the name of another variant of the recipe. tokens: the most that are drafted at
    once. The method's name alone takes the defaults.
    """

    quiet = frozenset({"draft"})

    method: Literal["ngram", "draft"]
    tokens: int = Field(4, ge=1, le=32)
    ngram_size: int = Field(3, ge=1, le=32)
    draft: str | None = None

    @property
    def unread(self) -> dict[str, str]:
        return {"ngram_size": "with method draft"} if self.method == "draft" else {"draft": "with method ngram"}

    @model_validator(mode="after")
    def _has_a_draft(self) -> Self:
        if self.method == "draft" and not self.draft:
            raise ValueError("method draft wants draft, the name of the variant that drafts")
        return self

    @property
    def options(self) -> dict[str, str]:
        """What a served folder says of it."""
        return {OPTION: self.model_dump_json()}


def _by_name(value: Any) -> Any:
    return {"method": value} if isinstance(value, str) else value


Speculation = Annotated[SpeculationSpec, BeforeValidator(_by_name)]


def speculation_of(options: Mapping[str, str]) -> SpeculationSpec | None:
    """What the options of a served folder say; None where it writes token by token."""
    return SpeculationSpec.model_validate_json(options[OPTION]) if OPTION in options else None


def next_draft_tokens(asked: SpeculationSpec, accepted: int) -> int:
    """How many tokens are drafted at once after so many of the last ones were accepted: a pass over others is dear where the
    processor, and not its memory, is what takes the time."""
    return min(asked.tokens, 2 * accepted + 1)


class Repetitions:
    """What stood before in a text. read: so many of its tokens are known; follows: where each n-gram was last gone on from."""

    def __init__(self, size: int) -> None:
        self.size = self.read = size
        self.follows: dict[tuple[int, ...], int] = {}

    def after(self, tokens: list[int], most: int) -> list[int]:
        """What may follow all the `tokens` of the text, `most` at most; none where its last n-gram never stood before."""
        size = self.size
        for end in range(self.read, len(tokens)):
            self.follows[tuple(tokens[end - size : end])] = end
        self.read = max(self.read, len(tokens))
        start = self.follows.get(tuple(tokens[-size:]))
        drafted: list[int] = []
        for place in range(start, start + most) if start is not None else ():
            drafted.append(tokens[place] if place < len(tokens) else drafted[place - len(tokens)])
        return drafted
