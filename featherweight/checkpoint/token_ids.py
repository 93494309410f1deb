"""The token ids in a checkpoint's settings: config.json, generation_config.json, tokenizer_config.json, added_tokens.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

ENDINGS = ("_token_id", "_token_ids", "_token_index", "_token_indices")
LISTS = ("suppress_tokens", "begin_suppress_tokens")
"""Lists of ids: one that no model can write any more needs not be suppressed."""
SEQUENCES = ("bad_words_ids", "force_words_ids", "stop_token_sequences")
"""Lists of sequences of ids."""


def token_ids(told: Any) -> Iterator[int]:
    """The ids that settings name, at whatever depth, but for those that are only kept from being written."""
    if isinstance(told, Mapping):
        for key, value in told.items():
            if str(key).endswith(ENDINGS):
                yield from _numbers(value)
            elif key == "forced_decoder_ids":
                yield from (pair[1] for pair in value or () if pair[1] is not None)
            elif key == "added_tokens_decoder":
                yield from map(int, value)
            elif key not in (*LISTS, *SEQUENCES):
                yield from token_ids(value)
    elif isinstance(told, list):
        for one in told:
            yield from token_ids(one)


def with_places(told: Any, places: Mapping[int, int]) -> Any:
    """The same settings with every id at its place in `places`; what bans a token that has none is left out."""
    if isinstance(told, list):
        return [with_places(one, places) for one in told]
    if not isinstance(told, Mapping):
        return told
    return {key: _placed(str(key), value, places) for key, value in told.items()}


def _placed(key: str, value: Any, places: Mapping[int, int]) -> Any:
    if value is None:
        return None
    if key.endswith(ENDINGS):
        return [_place(one, places) for one in value] if isinstance(value, list) else _place(value, places)
    if key in LISTS:
        return [places[one] for one in value if one in places]
    if key in SEQUENCES:
        return [[places[one] for one in row] for row in value if all(one in places for one in row)] or None
    if key == "forced_decoder_ids":
        return [[at, None if one is None else places[one]] for at, one in value]
    if key == "sequence_bias":
        return [[[places[one] for one in row], bias] for row, bias in value if all(one in places for one in row)] or None
    if key == "added_tokens_decoder":
        return {str(places[int(one)]): token for one, token in value.items()}
    return with_places(value, places)


def _numbers(value: Any) -> Iterator[int]:
    """Ids of tokens; a -1 stands for none."""
    for one in value if isinstance(value, list) else [value]:
        if isinstance(one, int) and one >= 0:
            yield one


def _place(one: Any, places: Mapping[int, int]) -> Any:
    """What no token ever had, such as the -1 of some configurations, stays."""
    return places.get(one, one)
