"""Generation settings that transformers' own `generate` fails on, found in JSON before anything is built or served by them.

Its logits processors and stopping criteria say what they take (transformers 5.17, generation/logits_process.py), and only once a
text is to be written. A setting that is off, or that plays no role beside the others, may be what it likes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from featherweight.checkpoint.files import CONFIG, Listing, read_json
from featherweight.checkpoint.opening import GENERATION
from featherweight.errors import CheckpointError

Rule = tuple[Callable[[Any], bool], str]
"""Whether a value can be followed, and what can."""


def require_followable(listing: Listing) -> None:
    """Raise CheckpointError for the first setting that transformers fails on; of config.json where no other file has them."""
    file = GENERATION if GENERATION in listing.sizes else CONFIG
    settings, config = read_json(listing, file), read_json(listing, CONFIG)
    for told, place, rules in ((settings, file, _rules(settings, config)), (config, CONFIG, _start_rules(config))):
        for name, (right, wanted) in rules:
            value = told.get(name)
            if value is not None and not right(value):
                raise CheckpointError(
                    f"{listing.where}/{place}: {name} is {value!r}, with which transformers' generate fails; it takes {wanted}: "
                    "mend it, or take it out of that file"
                )


def _start_rules(config: Mapping[str, Any]) -> Iterator[tuple[str, Rule]]:
    """What is asked of the token that targets begin with, whichever file names it."""
    if config.get("is_encoder_decoder"):
        most = _most(config)
        yield "decoder_start_token_id", (lambda value: _starts(value, most), f"an id below {most}")


def _most(config: Mapping[str, Any]) -> int:
    """How many tokens are written of."""
    vocabulary = config.get("decoder_vocab_size") or config.get("vocab_size")
    return vocabulary if isinstance(vocabulary, int) and _whole(vocabulary) else 2**31


def _rules(settings: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[tuple[str, Rule]]:
    """What is asked of each setting."""
    most = _most(config)
    yield from _TOKENS.items()
    yield from dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id"), _known(config.get("vocab_size"))).items()
    yield "bad_words_ids", (lambda value: _words(value, most), f"lists of ids below {most}, one at least")
    yield (
        "sequence_bias",
        (lambda value: _biases(value, most), f"pairs of a list of ids below {most} and a number with a decimal point"),
    )
    yield "exponential_decay_length_penalty", (_decay, "a place and a factor")
    yield from _start_rules(config)
    yield from _LENGTHS.items()
    yield from _PENALTIES.items()
    yield from _TOGETHER.items() if (settings.get("num_beams") or 1) != 1 else ()
    if settings.get("prompt_lookup_num_tokens") is not None:
        yield "assistant_ensemble_weight", (lambda value: value is None, "no number beside prompt_lookup_num_tokens")
    if settings.get("do_sample"):
        yield from _SAMPLING.items()


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _ids(value: Any) -> bool:
    return isinstance(value, list) and all(map(_whole, value))


def _known(vocabulary: Any) -> Rule:
    """Tokens that are written whatever the model says."""
    most = vocabulary if _whole(vocabulary) else 2**31

    def right(value: Any) -> bool:
        tokens = value if isinstance(value, list) else [value]
        return bool(tokens) and all(_whole(token) and 0 <= token < most for token in tokens)

    return right, f"ids below {most}" if vocabulary else "ids of tokens"


def _words(value: Any, most: int) -> bool:
    rows = isinstance(value, list) and bool(value) and all(map(_ids, value))
    return rows and all(row and min(row) >= 0 and max(row) < most for row in value)


def _biases(value: Any, most: int) -> bool:
    pairs = isinstance(value, list) and bool(value) and all(isinstance(pair, list) and len(pair) == 2 for pair in value)
    return (
        pairs and _words([ids for ids, _ in value], most) and all(isinstance(bias, float) and 0 not in ids for ids, bias in value)
    )


def _decay(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_number, value))


def _starts(value: Any, most: int) -> bool:
    tokens = value if isinstance(value, list) else [value]
    return all(not _whole(token) or 0 <= token < most for token in tokens)  # what is no id is told where it is looked for


def _penalty(value: Any) -> bool:
    return value == 1 or (isinstance(value, float) and value > 0)


_TOKENS: dict[str, Rule] = {
    "eos_token_id": (lambda value: _number(value) or (_ids(value) and bool(value)), "an id, or a list of some"),
    "suppress_tokens": (_ids, "a list of ids"),
    "begin_suppress_tokens": (_ids, "a list of ids"),
    "stop_strings": (bool, "a text, or a list of some"),
    "pad_token_id": (_whole, "an id"),
}
_LENGTHS: dict[str, Rule] = {
    **dict.fromkeys(
        ("max_length", "min_length", "min_new_tokens", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
        (_whole, "a whole number"),
    ),
    **dict.fromkeys(("max_new_tokens", "num_beams"), (lambda value: _whole(value) and value > 0, "a whole number above 0")),
}
_PENALTIES: dict[str, Rule] = dict.fromkeys(
    ("repetition_penalty", "encoder_repetition_penalty"), (_penalty, "a number above 0 with a decimal point")
)
_TOGETHER: dict[str, Rule] = {"low_memory": (lambda value: value is False, "false beside num_beams")}
"""Of a search of several texts at once."""
_SAMPLING: dict[str, Rule] = {
    "temperature": (_penalty, "a number above 0 with a decimal point (do_sample: false is greedy)"),
    "top_k": (lambda value: _whole(value) and value >= 0, "a whole number, 0 for all tokens"),
    "top_p": (lambda value: _number(value) and value >= 0, "a share from 0 to 1"),
    "min_p": (lambda value: _number(value) and 0 <= value <= 1, "a share from 0 to 1"),
    "top_h": (lambda value: _number(value) and 0 < value <= 1, "a share above 0, 1 at most"),
    "typical_p": (lambda value: _number(value) and value > 0, "a share above 0"),
}
