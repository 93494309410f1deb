"""What a checkpoint tells of itself before it is loaded: from config.json, generation_config.json and the headers of its weights.

Weights are not read and nothing large is fetched. What a source tells only by being fetched (a registry elsewhere, a service that
is down, code of the checkpoint's own) is known at load.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.adapters import adapter_weights, base_of, has_adapter, require_factors, require_same_use
from featherweight.checkpoint.conversion import named
from featherweight.checkpoint.description import described
from featherweight.checkpoint.dry_adapter import require_keepable, require_mergeable
from featherweight.checkpoint.dry_run import require_loadable
from featherweight.checkpoint.dry_tokenizer import read_by_tokenizers, tokenizer_facts
from featherweight.checkpoint.fetching import look_at
from featherweight.checkpoint.files import (
    CONFIG,
    TOKENIZER_CONFIG,
    Listing,
    Weights,
    adapter_files,
    check_length,
    find_weights,
    has_tokenizer,
    has_weights,
    read_json,
    require_indexed,
    require_tokenizer,
)
from featherweight.checkpoint.fit import require_fit
from featherweight.checkpoint.gguf import FLOATS, GRID_OF, gguf_file, keeps_integers
from featherweight.checkpoint.gguf_header import GgufHeader
from featherweight.checkpoint.gguf_parts import models_among, parts_of, whole_header
from featherweight.checkpoint.gguf_rotary import rotary_scaling, scale
from featherweight.checkpoint.heads import head_changes
from featherweight.checkpoint.inspection import require_described, require_head, require_output_head, require_task
from featherweight.checkpoint.kept_adapters import require_adapters
from featherweight.checkpoint.opening import GENERATION, generation_config
from featherweight.checkpoint.packed_shapes import unpacked_shapes
from featherweight.checkpoint.quantized_formats import grid_told, method_of
from featherweight.checkpoint.sanity import require_embedded, require_sane
from featherweight.checkpoint.spec import LoadSpec
from featherweight.grid import GRIDS, Grid
from featherweight.model.facts import CheckpointFacts, TokenizerFacts, Values
from featherweight.model.quantized_weights import DESCRIPTION
from featherweight.model.sparsity import FILE as SPARSITY

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


EMBEDDING = "token_embd.weight"
"""What llama.cpp calls it."""
ALREADY_QUANTIZED = f"the checkpoint is quantized already ({DESCRIPTION} beside its weights); leave the quantize stage out"


class KnownAtLoad(Exception):
    """Why nothing can be said before the checkpoint is loaded."""


def read_facts(spec: LoadSpec) -> CheckpointFacts:
    """What the source of `spec` tells of its checkpoint.

    Raises CheckpointError, as loading it would, for what can be told to be wrong; KnownAtLoad where only loading tells.
    """
    kept = require_adapters(spec)
    facts = facts_for_any_task(spec)
    require_task(spec.source, facts.config, spec.task)
    config = (_config_here(spec, facts) or {}) if kept else {}
    for name, adapter in kept.items() if config else ():
        require_keepable(name, adapter, config)
    return replace(facts, opened=_opened(spec, facts))


def _opened(spec: LoadSpec, facts: CheckpointFacts) -> TokenizerFacts | None:
    """What the tokenizer does of a checkpoint whose files are within reach; None of others.

    Raises CheckpointError for what the tokenizer is found to be only by loading it.
    """
    seen = look_at(spec)
    rows = getattr(facts.config.get_text_config(), "vocab_size", None)
    rows = rows if isinstance(rows, int) else None
    if isinstance(seen, Listing):
        return _opened_far_away(seen, rows)
    if seen is None:
        return None
    if (file := gguf_file(seen)) is not None:
        rows = (facts.shapes or {}).get(EMBEDDING, (rows,))[0]
        with named(file, spec.source):
            return tokenizer_facts(file, rows)
    if has_adapter(seen, spec):
        return _opened_of_adapted(seen, spec, facts, rows)
    with named(seen, spec.source):
        return tokenizer_facts(seen, rows)


def _opened_of_adapted(adapter: Path, spec: LoadSpec, facts: CheckpointFacts, rows: int | None) -> TokenizerFacts | None:
    """The same of the model that an adapter is merged into: by its own tokenizer where it has one, under the base's config."""
    base = _base_spec(adapter, spec)
    if not has_tokenizer(Listing.of(adapter)):
        return _opened(base, facts)
    seen = look_at(base)
    if not isinstance(seen, Path) or not (seen / CONFIG).is_file():
        return None
    with tempfile.TemporaryDirectory() as place, named(Path(place), spec.source):
        for name in read_by_tokenizers(Listing.of(adapter)):
            (Path(place) / name).parent.mkdir(parents=True, exist_ok=True)
            (Path(place) / name).symlink_to((adapter / name).resolve())
        (Path(place) / CONFIG).symlink_to((seen / CONFIG).resolve())
        return tokenizer_facts(Path(place), rows)


def _opened_far_away(listing: Listing, rows: int | None) -> TokenizerFacts | None:
    """The same of files elsewhere, of which the tokenizer's alone are fetched."""
    with tempfile.TemporaryDirectory() as place, named(Path(place), listing.where):
        for name in (CONFIG, *read_by_tokenizers(listing)):
            (Path(place) / name).parent.mkdir(parents=True, exist_ok=True)
            with (Path(place) / name).open("wb") as file:
                file.writelines(listing.pieces(name))
        return tokenizer_facts(Path(place), rows)


def facts_for_any_task(spec: LoadSpec) -> CheckpointFacts:
    """The same, whatever the model is made for; `spec.task` plays no role."""
    seen = look_at(spec)
    if seen is None:
        raise KnownAtLoad(f"{spec.source} has to be fetched first")
    if isinstance(seen, Listing):
        return _of_listing(seen, spec)
    with named(seen, spec.source):
        if (gguf := gguf_file(seen)) is not None:
            return _of_gguf(gguf)
        return _of_adapted(seen, spec) if has_adapter(seen, spec) else _of_folder(seen, spec)


def facts_of(folder: Path, config: PreTrainedConfig) -> CheckpointFacts:
    """The same of a folder that a stage is given, whose `config` is open already: plain float safetensors."""
    listing = Listing.of(folder)
    shapes, size = _shapes(listing, find_weights(listing))
    settings = generation_config(folder, config)
    return CheckpointFacts(config, settings, shapes, size, sparse=SPARSITY in listing.sizes, tokenizer=_tokenizer(listing))


def shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors of a folder of safetensors, by name."""
    listing = Listing.of(folder)
    return _shapes(listing, find_weights(listing))[0] or {}


def _tokenizer(listing: Listing) -> str | None:
    """The class that is to read the tokenizer."""
    told = read_json(listing, TOKENIZER_CONFIG) if TOKENIZER_CONFIG in listing.sizes else {}
    return told.get("tokenizer_class")


def kept_refusal(facts: CheckpointFacts) -> str | None:
    """Why a checkpoint that came with integers of its own is not quantized; None for floats, or where only loading tells."""
    return ALREADY_QUANTIZED if facts.grids else None


def _of_folder(folder: Path, spec: LoadSpec) -> CheckpointFacts:
    listing = Listing.of(folder)
    told = _require_plain(listing, spec)
    weights = find_weights(listing, allow_pickle=spec.allow_pickle)
    require_tokenizer(listing)
    return _facts(described(folder), folder, told, listing, weights)


def _of_listing(listing: Listing, spec: LoadSpec) -> CheckpointFacts:
    """Files far away, whose headers can be read there."""
    alone = not has_weights(listing) and bool(models_among(listing.sizes))
    if CONFIG not in listing.sizes or adapter_files(listing) or alone:
        raise KnownAtLoad(f"{listing.where} holds no plain checkpoint, and is looked into once it is here")
    told = _require_plain(listing, spec)
    weights = find_weights(listing, allow_pickle=spec.allow_pickle)
    require_tokenizer(listing)
    with tempfile.TemporaryDirectory() as place:
        for name in {CONFIG, GENERATION} & listing.sizes.keys():
            (Path(place) / name).write_bytes(listing.read(name, listing.sizes[name]))
        answer = described(Path(place), called=f"{listing.where}/{CONFIG}")
        return _facts(answer, Path(place), told, listing, weights)


def _require_plain(listing: Listing, spec: LoadSpec) -> Mapping[str, Any]:
    """config.json; raises CheckpointError for what is not taken, KnownAtLoad for code of its own that is trusted."""
    require_described(listing, spec.trust_remote_code)
    require_sane(listing)
    told = read_json(listing, CONFIG)
    if spec.trust_remote_code and told.get("auto_map"):
        raise KnownAtLoad("its own code describes it")
    return told


def _facts(answer: Mapping[str, Any], folder: Path, told: Mapping[str, Any], listing: Listing, weights: Weights) -> CheckpointFacts:
    """folder: has config.json."""
    method = method_of(told)
    shapes, size = _shapes(listing, weights)
    plain = shapes if shapes is None or method is None else unpacked_shapes(told, shapes, listing.where)
    if plain is not None:
        head = head_changes(listing, Values(answer["config"]), plain)[0]
        settled = Values({**answer["config"], "values": answer["config"]["values"] | head})
        require_head(listing.where, settled)
        require_output_head(listing.where, settled, plain)
        if not require_fit(listing.where, Values(answer["config"]), plain):
            require_loadable(listing.where, folder, head, plain)
        answer["config"]["values"].update(head)
    require_embedded(listing, told.get("vocab_size"))
    return CheckpointFacts(
        Values(answer["config"]),
        Values({"values": answer["generation"], "names": {}}),
        shapes if method is None else None,
        size,
        method,
        _grids_told(method, told.get("quantization_config")),
        sparse=SPARSITY in listing.sizes,
        tokenizer=_tokenizer(listing),
    )


def _grids_told(method: str | None, settings: Any) -> dict[str, Grid]:
    """The grid of the matrices in the blocks by the settings of a checkpoint that others quantized, as loading finds it."""
    grid = None if method is None else grid_told(method, settings)
    return {} if grid is None else {"model.layers.0.body.weight": grid}


def _shapes(listing: Listing, weights: Weights) -> tuple[dict[str, tuple[int, ...]] | None, int]:
    """The shapes that the headers name, None for a pickle, which has none; and the bytes of the weight files.

    Raises CheckpointError for a file that is cut short.
    """
    size = sum(listing.sizes[name] for name in weights.files)
    if weights.pickled:
        return None, size
    headers = {name: check_length(listing, name) for name in weights.files}
    require_indexed(listing.where, weights, headers)
    return {name: tuple(entry["shape"]) for header in headers.values() for name, entry in header.items()}, size


def _of_gguf(file: Path) -> CheckpointFacts:
    """The tensors keep llama.cpp's names. Integers stay where all of a model's matrices in the blocks are of one type of ours."""
    parts = parts_of(file)
    header = whole_header(parts)
    told, generation = _described_by(header, str(parts[0]), rotary_scaling(parts, header))
    shapes = {name: tuple(reversed(tensor.shape)) for name, tensor in header.tensors.items()}
    kinds = {name: tensor.type for name, tensor in header.tensors.items() if len(tensor.shape) == 2}
    grids = {name: GRIDS[GRID_OF[kind]] for name, kind in kinds.items() if kind in GRID_OF and keeps_integers(kinds)}
    packed = any(kind not in FLOATS for kind in kinds.values())
    size = sum(part.stat().st_size for part in parts)
    return CheckpointFacts(told, generation, shapes, size, "gguf" if packed else None, grids)


def _described_by(header: GgufHeader, called: str, scaling: Mapping[str, Any]) -> tuple[Values, Values]:
    """Configuration and generation settings. transformers would count a vocabulary piece by piece, which takes it a minute.

    scaling: of the rotary embeddings.
    """
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "model.gguf").write_bytes(header.sketch())
        answer = described(Path(place), "model.gguf", called=called)
    config = answer["config"]
    if scaling:
        scale(config["values"]["rope_parameters"], scaling)
    if header.pieces is not None and not any(key.endswith(".vocab_size") for key in header.settings):
        config["values"][config["names"].get("vocab_size", "vocab_size")] = header.pieces
    return Values(config), Values({"values": answer["generation"], "names": {}})


def _base_spec(found: Path, spec: LoadSpec) -> LoadSpec:
    """How the model is loaded that the adapter in the folder `found` is merged into."""
    told = base_of(found, spec)
    plain = {"source": told or spec.source, "base": None, "adapter": "ignore" if told is None else None}
    return spec.model_copy(update=plain)


def _of_adapted(found: Path, spec: LoadSpec) -> CheckpointFacts:
    """Those of the model that the adapter is merged into."""
    base = _base_spec(found, spec)
    adapter_weights(found, spec)
    facts = facts_for_any_task(base)
    require_same_use(found, facts.config)
    require_factors(found, facts.shapes)
    if (config := _config_here(base, facts)) is not None:
        require_mergeable(found, config)
    return replace(facts, quantized=None, grids=dict[str, Grid](), sparse=False)


def _config_here(spec: LoadSpec, facts: CheckpointFacts) -> Mapping[str, Any] | None:
    """config.json of a plain checkpoint, with the head that it is given; None of a GGUF file, of an adapter, or out of reach."""
    seen = look_at(spec)
    if seen is None or (isinstance(seen, Path) and (seen.is_file() or has_adapter(seen, spec))):
        return None
    listing = seen if isinstance(seen, Listing) else Listing.of(seen)
    if CONFIG not in listing.sizes:
        return None
    named_head = getattr(facts.config, "architectures", None)
    return {**read_json(listing, CONFIG), **({"architectures": named_head} if named_head else {})}
