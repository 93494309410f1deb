"""Numbers that no model has, and tensors that are no weights yet, found in JSON and headers before a library builds on them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from featherweight.checkpoint.files import CONFIG, INDEX, TOKENIZER_CONFIG, WEIGHTS, Listing, find_weights, read_header, read_json
from featherweight.checkpoint.fit import beyond_embedding
from featherweight.checkpoint.generation_faults import require_followable
from featherweight.checkpoint.packed_shapes import require_whole
from featherweight.checkpoint.quantized_formats import method_of, require_packed, require_readable
from featherweight.errors import CheckpointError

LARGEST_ID = 10_000_000
"""Tokenizers make room for every id up to the largest; the largest vocabulary that was seen has a million."""
LARGEST = 10_000_000_000
TYPES = ("float32", "float16", "bfloat16", "float64")
STORED = ("F64", "F32", "F16", "BF16")
"""The same floats as safetensors calls them."""
TYPE_NAMES = {"F8_E4M3": "float8", "F8_E5M2": "float8", "F8_E8M0": "float8", "F4": "float4"}
DEEPEST = 64
ROTARY = (
    "rope_theta",
    "factor",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
)
"""What rotary embeddings are divided by, or multiplied with."""
TOKENIZER = "tokenizer.json"
_LAYERS = re.compile(r"(?!max_window_)(num_|n_)?(\w+_)?layers?")
_HEADS = re.compile(r"(num_|n_)?(\w+_)?heads?")
_TOKENS = re.compile(r"\w+_token_id")
_SHARES = re.compile(r"(\w+_)?(dropout|pdrop|layerdrop)(_prob|_rate|_p)?")
_APART = re.compile(r"\.(lora_(A|B|magnitude_vector|embedding_[AB])|base_layer|modules_to_save)\.")
"""What peft calls the parts of a layer whose adapter is not merged."""


def require_sane(listing: Listing) -> None:
    """Raise CheckpointError for more layers than there are tensors, for numbers and token ids beyond any model, for tensors
    that a model is yet to be made of, and for generation settings that transformers fails on.

    Only headers and JSON are read, and nothing is built.
    """
    told = read_json(listing, CONFIG)
    _require_usual(listing, told)
    header = _header(listing)
    tensors = None if header is None else len(header)
    _require_plain(listing, header or {})
    if method_of(told) is not None:
        floats = header is not None and all(str(entry.get("dtype")) in STORED for entry in header.values())
        require_readable(told, listing.where, floats=floats)
    if header is not None:
        require_packed(told, header, listing.where)
        require_whole(told, header, listing.where)
    _require_type(listing, told)
    _require_rotary(listing, told)
    _require_one_cut(listing)
    require_followable(listing)
    for name in (CONFIG, "generation_config.json"):
        if name in listing.sizes:
            for key, number in _numbers(read_json(listing, name)):
                _require_number(f"{listing.where}/{name}", key, number, tensors)
    for name, ids in _ids(listing):
        far = max(ids, default=0)
        if far > LARGEST_ID:
            raise CheckpointError(f"{listing.where}/{name} has the token id {far}; no vocabulary is so large; copy it again")


def require_embedded(listing: Listing, rows: Any) -> None:
    """Raise CheckpointError where tokenizer.json has tokens beyond an embedding of so many rows, as far as that is known."""
    far = max((max(ids, default=0) for name, ids in _ids(listing) if name == TOKENIZER), default=0)
    if isinstance(rows, int) and far >= rows > 0:
        raise CheckpointError(f"{listing.where}: {beyond_embedding(far, rows)}")


def _require_one_cut(listing: Listing) -> None:
    """Refuse a tokenizer that leaves out merges by chance, as it is for training: it cuts a text otherwise each time."""
    model = read_json(listing, TOKENIZER).get("model") if TOKENIZER in listing.sizes else None
    if isinstance(model, dict) and model.get("dropout"):
        raise CheckpointError(
            f"{listing.where}/{TOKENIZER}: its BPE has a dropout of {model['dropout']}, by which it cuts a text otherwise each "
            'time; write "dropout": null there to serve the model'
        )


def _require_type(listing: Listing, told: Mapping[str, Any]) -> None:
    """Refuse what is no name of the floats that the weights are stored in."""
    key = next((key for key in ("dtype", "torch_dtype") if told.get(key) is not None), "")
    name = told.get(key)
    if key and (name not in TYPES):
        raise CheckpointError(f"{listing.where}/{CONFIG}: {key} is {name!r}, and must be one of {', '.join(TYPES)}, or left out")


def _require_rotary(listing: Listing, told: Mapping[str, Any]) -> None:
    """Refuse rotary embeddings that are told in no numbers, or by a base that leaves no angles."""
    parts = [told[key] for key in ("rope_parameters", "rope_scaling") if isinstance(told.get(key), dict)]
    parts += [one for part in parts for one in part.values() if isinstance(one, dict)]
    for key, value in [("rope_theta", told.get("rope_theta")), *(item for part in parts for item in part.items())]:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key in ROTARY and value is not None and not (number and value > 0):
            raise CheckpointError(f"{listing.where}/{CONFIG}: {key} is {value!r}, and must be a number above 0")


def _require_usual(listing: Listing, told: Mapping[str, Any]) -> None:
    """Refuse weights that lie under a name of their own, which engines do not look for."""
    if named := told.get("transformers_weights"):
        usual = INDEX if str(named).endswith(".json") else WEIGHTS
        raise CheckpointError(
            f"{listing.where}/{CONFIG} says that the weights are {named} (transformers_weights); call that file {usual}, and take "
            "the entry out"
        )


def _require_number(where: str, key: str, number: float, tensors: int | None) -> None:
    if number != number:
        raise CheckpointError(f"{where}: {key} is NaN; copy it again")
    if _HEADS.fullmatch(key) and number < 0:
        raise CheckpointError(f"{where}: {key} is {number:.0f}; no model has fewer than none")
    if _SHARES.fullmatch(key) and not 0 <= number <= 1:
        raise CheckpointError(f"{where}: {key} is {number:g}, and must be from 0 to 1")
    if tensors is not None and _LAYERS.fullmatch(key) and number > tensors:
        raise CheckpointError(f"{where}: {key} is {number:.0f}, but the files hold {tensors} tensors; they do not belong together")
    if isinstance(number, int) and number > (LARGEST_ID if _TOKENS.fullmatch(key) else LARGEST):
        raise CheckpointError(f"{where}: {key} is {number:.0f}; no model has so many")


def _header(listing: Listing) -> dict[str, Any] | None:
    """What the files say of each tensor; None where a pickle would have to be opened for it."""
    weights = find_weights(listing, allow_pickle=True)
    if weights.pickled:
        return None
    return {name: entry for file in weights.files for name, entry in read_header(listing, file).items()}


def _require_plain(listing: Listing, header: Mapping[str, Any]) -> None:
    """Refuse what an adapter has not been merged into yet, and numbers of 8 bits that nothing says the scales of."""
    apart = next((name for name in header if _APART.search(name)), None)
    if apart:
        raise CheckpointError(
            f"{listing.where} was saved with an adapter in it ({apart}); call merge_and_unload() on the model and save that, "
            "or give the adapter's own folder"
        )
    told = read_json(listing, CONFIG)
    if isinstance(told.get("quantization"), dict) and any(name.endswith(".biases") for name in header):
        raise CheckpointError(f"{listing.where}: MLX packed the weights, which is not read here; give the float checkpoint")
    narrow = next((name for name, entry in header.items() if _narrow(name, entry)), None)
    if narrow and method_of(told) is None:
        kind = TYPE_NAMES.get(str(header[narrow]["dtype"]), "integers")
        raise CheckpointError(
            f"{listing.where}: {narrow} is in {kind}, and {CONFIG} has no quantization_config that says its scale; "
            "give the float checkpoint"
        )


def _narrow(name: str, entry: Mapping[str, Any]) -> bool:
    """Whether a tensor holds a matrix in numbers that need a scale."""
    kind, shape = str(entry.get("dtype")), entry.get("shape") or ()
    matrix = len(shape) > 1 and (name.endswith(".weight") or ".experts." in name)
    return kind.startswith(("F8", "F4", "F6")) or (kind[0] in "IU" and matrix)


def _numbers(value: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, float]]:
    """Every number of a JSON tree, and what is none (NaN), with the key that it stands under."""
    if depth > DEEPEST:
        raise CheckpointError(f"{CONFIG} is nested more than {DEEPEST} deep; is it a transformers checkpoint?")
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value
    elif isinstance(value, dict):
        for name, one in value.items():
            yield from _numbers(one, name, depth + 1)
    elif isinstance(value, list):
        for one in value:
            yield from _numbers(one, key, depth + 1)


def _ids(listing: Listing) -> Iterator[tuple[str, list[int]]]:
    """Token ids by the file that gives them, as far as it has the usual form; the rest is for its library to judge."""
    for name in ("vocab.json", "added_tokens.json"):
        if name in listing.sizes:
            yield name, _integers(read_json(listing, name).values())
    if TOKENIZER_CONFIG in listing.sizes:
        added = read_json(listing, TOKENIZER_CONFIG).get("added_tokens_decoder")
        yield TOKENIZER_CONFIG, [int(one) for one in added if one.isdigit()] if isinstance(added, dict) else []
    if TOKENIZER in listing.sizes:
        tree = read_json(listing, TOKENIZER)
        model, added = tree.get("model"), tree.get("added_tokens")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        yield TOKENIZER, _integers(vocabulary.values() if isinstance(vocabulary, dict) else ())
        yield TOKENIZER, _integers(one.get("id") for one in added or () if isinstance(one, dict))


def _integers(values: Iterable[Any]) -> list[int]:
    return [one for one in values if isinstance(one, int)]
