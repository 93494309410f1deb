"""What engines are compared on: windows of tokens and prompts, as long as what is served, and round the model's edges.

Any ids do for a comparison of two engines, so that where the text has no document of a length its pieces are put end to end.
"""

from __future__ import annotations

from itertools import chain, cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.model.architecture import family_of
from featherweight.model.positions import edges
from featherweight.text.model_inputs import scoring_windows
from featherweight.text.tokens import Window

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SHORT_TOKENS, SHORT_WINDOWS = 128, 5
NEW_TOKENS = 16
MOST_EDGES = 4
"""So many of a model's edges are looked at; no configuration that was seen has more."""


def edges_within(config: PreTrainedConfig, tokens: int) -> list[int]:
    """The edges of a model that a sequence of `tokens` crosses; see featherweight.model.positions.edges."""
    return [edge for edge in edges(config) if edge < tokens][:MOST_EDGES]


def probe_windows(source: Path, config: PreTrainedConfig, text: Path, tokens: int) -> list[Window]:
    """A window of `tokens`, some round each edge, and short ones, which see more kinds of text at less cost.

    `source` has the tokenizer. Raises DataError for too little text.
    """
    short = min(SHORT_TOKENS, tokens)
    pieces = scoring_windows(source, config, text, short, SHORT_WINDOWS + -(-tokens // 64))
    # A window of n tokens is a sequence of n - 1 to the model: the last is only predicted.
    around = [edge + more for edge in edges_within(config, tokens) for more in (0, 1, 2) if edge + more < tokens]
    whole = [_joined(config, pieces, length) for length in (tokens, *around)]
    return [*whole, *islice(cycle(pieces), SHORT_WINDOWS)]


def new_tokens(tokens: int) -> int:
    """How many tokens an engine is to write after each prompt, where `tokens` are served in all."""
    return min(NEW_TOKENS, tokens // 2)


def probe_prompts(config: PreTrainedConfig, longest: Window, tokens: int) -> list[list[int]]:
    """Prompts cut from the longest window: one whose new tokens end where serving does, and one to cross each edge.

    An encoder, which writes nothing, has none.
    """
    if family_of(config) == "encoder":
        return []
    last = tokens - new_tokens(tokens)
    across = (edge - new_tokens(tokens) // 2 for edge in edges_within(config, tokens))
    lengths = dict.fromkeys([last, *(length for length in across if 0 < length <= last)])
    return [(longest.source or longest.ids)[:length] for length in lengths]


def _joined(config: PreTrainedConfig, pieces: list[Window], length: int) -> Window:
    """The pieces end to end, from the first again where they do not suffice, cut at `length`; `text_bytes` is 0."""
    start, bodies = pieces[0].ids[:1], [piece.ids[1:] for piece in pieces]
    ids = [*start, *islice(cycle(chain(*bodies)), length - 1)]
    if family_of(config) == "causal":
        return Window(ids, 0)
    if family_of(config) == "seq2seq":
        return Window(ids, 0, list(islice(cycle(chain(*(piece.source for piece in pieces))), length)))
    first, sources = pieces[0].source[:1], [piece.source[1:] for piece in pieces]
    return Window(ids, 0, [*first, *islice(cycle(chain(*sources)), length - 1)])
