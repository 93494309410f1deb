"""What a variant with speculation needs beside it in a plan: itself without, and the one that drafts for it."""

from __future__ import annotations

from collections.abc import Callable, Collection

from featherweight.errors import nearest
from featherweight.recipe.refusals import Chosen

NONE = "none"
Choice = tuple[str, str, str, str]
"""Names of a (distill, prune, quantize, serve)."""


def name_of(choice: Choice) -> str:
    """The name of the variant."""
    return "/".join(part for part in choice if part != NONE)


def draft_of(chosen: Chosen, choices: Collection[Choice]) -> Choice | None:
    """The variant that drafts for it, if one does and is there."""
    asked = chosen.serve.speculation
    return next((one for one in choices if name_of(one) == asked.draft), None) if asked and asked.draft else None


def beside_refusal(choice: Choice, choices: Collection[Choice], known: Callable[[Choice], Chosen]) -> str | None:
    """Why a choice is not run with what is beside it; None where it drafts nothing, or all that it needs is there.

    known: what is chosen by each of the `choices`.
    """
    chosen = known(choice)
    asked, plain = chosen.serve.speculation, chosen.serve.without_speculation
    if asked is None:
        return None
    if not any(one[:-1] == choice[:-1] and known(one).serve == plain for one in choices):
        return "speculation: the same without it is no variant of this recipe, and is to win where speculation does not pay; add it"
    if asked.draft is None:
        return None
    draft = draft_of(chosen, choices)
    if draft is None:
        return (
            f"speculation.draft: '{asked.draft}' is no variant of this recipe; {nearest(asked.draft, list(map(name_of, choices)))}"
        )
    reason = _draft_refusal(chosen, known(draft))
    return reason and f"speculation.draft: {asked.draft} {reason}"


def _draft_refusal(chosen: Chosen, draft: Chosen) -> str | None:
    """Why one variant does not draft for another."""
    if draft.serve.speculation:
        return "has speculation itself; name one that has none"
    if draft.serve.engine != chosen.serve.engine:
        return f"is served by {draft.serve.engine}, and drafts for {chosen.serve.engine} come of {chosen.serve.engine}"
    if reason := draft.obstacle():
        return f"is ruled out: {reason}"
    sizes = [one.distilled.config.vocab_size if one.distilled else None for one in (chosen, draft)]
    trims = [one.prune if one.prune and one.prune.other_tokens else None for one in (chosen, draft)]
    if trims[0] == trims[1] and (None in sizes or sizes[0] == sizes[1]):
        return None
    return "has other tokens than what it is to draft for; name one with the same tokenizer"
