"""What a checkpoint says in two ways, settled once, by what its files hold: names of tensors, and whether the head is tied.

And what transformers computes with though the files hold something else (see overwritten.py), by what it computes with.

transformers puts up with a good deal (names without the model's prefix, a config that calls a head tied that the file holds by
itself), engines and quantizers do not, and each in its own way. So a checkpoint that needs it is written again as transformers
reads it before anything looks at it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.files import CONFIG, INDEX, PICKLE_INDEX, WEIGHTS, Listing, Weights, find_weights, needed_files
from featherweight.checkpoint.heads import head_changes
from featherweight.checkpoint.inspection import HEADLESS, is_base, model_class, quiet
from featherweight.checkpoint.opening import generation_config, starting_token
from featherweight.checkpoint.overwritten import as_loaded, overwritten
from featherweight.checkpoint.quantized_formats import method_of
from featherweight.checkpoint.spec import LoadSpec
from featherweight.checkpoint.tensors import read_shapes, saving, stream_tensors
from featherweight.checkpoint.unpacking import read_config
from featherweight.errors import CheckpointError
from featherweight.model.architecture import class_by_type, medium_refusal
from featherweight.model.names import reading
from featherweight.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What torch.compile, FSDP and activation checkpointing put anywhere into the names of a model's tensors."""
PARALLEL, ADAPTED = "module", "base_model.model"
"""What DistributedDataParallel puts before all of them, and peft, whose adapters may have been merged since."""


AS_RUN = {"return_dict": True, "output_attentions": False, "output_hidden_states": False, "chunk_size_feed_forward": 0}
"""What a model is to give beside its logits, and in what form: nothing is read here but them, which are the same."""
EMPTY = "quantization_config"
"""What stands for packed weights to engines where it is there at all; without a value it stands for none."""
CODE = ("attn_implementation", "_attn_implementation", "experts_implementation")
"""Entries of config.json of whose code is to compute it, which may not be on this machine; an engine has its own."""


HEAD = {
    False: "config.json ties the head to the embedding, and the weights hold a head of their own, which is kept",
    True: "config.json has a head of its own, and the weights hold none: the embedding is the head",
}


@dataclass(frozen=True)
class Settlement:
    """What is to be written otherwise: `names` of tensors (stored -> read), `values` by stored name, entries of config.json."""

    names: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Tensor] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def metrics(self) -> dict[str, float]:
        """`renamed_tensors`, `overwritten_tensors` and `head_settled`, each only where there is something to tell."""
        counts = {"renamed_tensors": len(self.names), "overwritten_tensors": len(self.values)}
        counts["head_settled"] = int("tie_word_embeddings" in self.config)
        return {name: float(count) for name, count in counts.items() if count}


@dataclass(frozen=True)
class Stored:
    """A folder's weights: the names in its files, and under which of a model's names each is read.

    values: of tensors, by the names in the files, that are read as others than they are there.
    """

    folder: Path
    weights: Weights
    reads: Mapping[str, str]
    values: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, weights: Weights, model: PreTrainedModel) -> Stored:
        """As `model` reads the tensors of `folder`, wrappers' names and a missing prefix of the base model allowed for."""
        names = list(read_shapes(Listing.of(folder), folder, weights))
        found = cls(folder, weights, names_read(names, model))
        require_once(folder, found.reads)
        return replace(found, values=found._overwritten(model))

    @property
    def renamed(self) -> dict[str, str]:
        """Only what is read under another name than it is stored under."""
        return {name: read for name, read in self.reads.items() if name != read}

    def equal(self, held: Callable[[str], str], *names: str) -> bool:
        """Whether the tensors that the model holds under these names have the same values."""
        found = [tensor for name, tensor in self.tensors() if held(self.reads[name]) in names]
        return all(tensor.equal(found[0]) for tensor in found)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) one by one, with the names of the files and the values that are read."""
        stored = stream_tensors(self.folder, self.weights)
        return ((name, self.values.get(name, tensor)) for _, name, tensor in stored)

    def _overwritten(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """The values of what transformers does not leave as it is stored."""
        held, names = reading(model), overwritten(model)
        if not names:
            return {}
        mine = {held(self.reads[name]): (name, tensor) for name, tensor in self.tensors() if held(self.reads[name]) in names}
        changed = as_loaded(model, {name: tensor for name, (_, tensor) in mine.items()})
        return {mine[name][0]: tensor for name, tensor in changed.items()}


def names_read(names: list[str], model: PreTrainedModel) -> dict[str, str]:
    """Stored name -> the one that `model` reads it under, wrappers' names and a missing prefix of the base model allowed for."""
    plain = _unwrapped(names, model)
    missing = _tops(model.base_model) - _tops(model)
    prefix = f"{model.base_model_prefix}."
    reads = {name: prefix + one if one.partition(".")[0] in missing else one for name, one in plain.items()}
    if model.base_model is model and prefix != ".":  # saved with a head that is not read
        reads = {name: one.removeprefix(prefix) for name, one in reads.items()}
    first = _first_names(model, set(reads.values()))
    return {name: first.get(one, one) for name, one in reads.items()}


def require_once(where: Path, reads: Mapping[str, str]) -> None:
    """Refuse two tensors for one place, of which transformers takes either, without a word."""
    first: dict[str, str] = {}
    for name, read in reads.items():
        if read in first:
            raise CheckpointError(f"{where}: tensors {first[read]} and {name} are both {read}; leave one of them out")
        first[read] = name


def settle(found: Path, spec: LoadSpec, work: Path, progress: Progress) -> tuple[Path, dict[str, float]]:
    """The folder `found`, or one in `work` that holds the same as safetensors under the names and config that transformers reads.

    Metrics say what was changed, and so do notes. Raises CheckpointError for a model that was saved without its head.
    """
    listing = Listing.of(found)
    weights = find_weights(listing, allow_pickle=spec.allow_pickle)
    try:
        model, head, note = _skeleton(found, spec, weights)
    except CheckpointError:
        raise
    except Exception:  # whatever is wrong with the config, inspection says it in a line
        return found, {}
    settlement = _settlement(Stored.of(found, weights, model), model, head, note)
    if not (settlement.names or settlement.values or settlement.config or weights.pickled):
        return found, {}
    for note in settlement.notes:
        progress.note(note)
    folder = work / "settled"
    folder.mkdir()
    rewritten = {CONFIG, INDEX, PICKLE_INDEX, *weights.files}
    for name in needed_files(listing, weights, trust_remote_code=spec.trust_remote_code):
        if name not in rewritten:
            _symlink(found / name, folder / name)
    config = read_config(found) | dict(settlement.config)
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if (k, v) != (EMPTY, None)}, indent=2) + "\n")
    if settlement.names or settlement.values or weights.pickled:
        _write_weights(found, weights, settlement, model.all_tied_weights_keys, folder, progress)
    else:
        for name in (*weights.files, *((INDEX,) if weights.index else ())):
            _symlink(found / name, folder / name)
    return folder, settlement.metrics()


def settle_head(folder: Path, spec: LoadSpec, progress: Progress) -> dict[str, float]:
    """Have config.json say of a folder of floats whether its head is tied, by what its files hold; the metric of that."""
    weights = find_weights(Listing.of(folder))
    model = _skeleton(folder, spec, weights)[0]
    tied = _tied_by_file(Stored.of(folder, weights, model), model)
    if tied is None:
        return {}
    progress.note(HEAD[tied])
    (folder / CONFIG).write_text(json.dumps(read_config(folder) | {"tie_word_embeddings": tied}, indent=2) + "\n")
    return {"head_settled": 1.0}


def _symlink(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.symlink_to(source.resolve())


def _skeleton(folder: Path, spec: LoadSpec, weights: Weights) -> tuple[PreTrainedModel, dict[str, Any], str | None]:
    """The architecture that the folder is read into, without memory; what config.json has to say of its head, and a note."""
    import torch
    from transformers import AutoConfig

    with quiet(), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=spec.trust_remote_code)
        config._attn_implementation = config._experts_implementation = None
        listing = Listing.of(folder)
        head, note = head_changes(listing, config, read_shapes(listing, folder, weights))
        for name, value in head.items():
            setattr(config, name, value)
        if reason := medium_refusal(config):
            raise CheckpointError(f"{folder}: {reason}")
        made = model_class(config, folder, spec.trust_remote_code)
        return made._from_config(config), head, note


def _settlement(stored: Stored, model: PreTrainedModel, head: Mapping[str, Any], note: str | None) -> Settlement:
    config, renamed = read_config(stored.folder), stored.renamed
    notes: list[str] = [note] if note else []
    changes: dict[str, Any] = dict(head) | _decoder_start(stored.folder, model.config) | as_run(config)
    if renamed:
        first, read = next(iter(renamed.items()))
        notes.append(f"{len(renamed)} tensors take the names that transformers reads them under: {first} is {read}")
    if stored.values:
        listed = ", ".join(sorted(stored.values))
        notes.append(f"transformers writes into {listed} when it loads a {model.config.model_type} model: that is taken over")
    if not head and (is_base(model.config) or class_by_type(model.config)):
        changes |= {"architectures": [type(model).__name__]} if model.config.architectures != [type(model).__name__] else {}
    tied = _tied_by_file(stored, model) if method_of(config) is None else None
    if tied is not None:
        changes["tie_word_embeddings"] = tied
        notes.append(HEAD[tied])
    return Settlement(renamed, stored.values, changes, tuple(notes))


def as_run(config: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json has to say otherwise of how the model runs."""
    told = {name: value for name, value in AS_RUN.items() if name in config and config[name] != value}
    without = [EMPTY] if EMPTY in config and config[EMPTY] is None else []
    return told | dict.fromkeys([*without, *(name for name in CODE if config.get(name) is not None)])


def _decoder_start(folder: Path, config: Any) -> dict[str, int]:
    """The token that `generate` begins targets with, where config.json says another or none: by that all others go."""
    if not config.is_encoder_decoder:
        return {}
    start = starting_token(generation_config(folder, config))
    return {"decoder_start_token_id": start} if start != getattr(config, "decoder_start_token_id", None) else {}


def _tied_by_file(stored: Stored, model: PreTrainedModel) -> bool | None:
    """Whether the weights have the embedding for a head, where config.json says otherwise; None where the two agree.

    A T5's config is left as it is: it says how the head is scaled, and transformers takes the head that is stored.
    """
    output, source = model.get_output_embeddings(), model.get_input_embeddings()
    if output is None or source is None or output.weight.shape != source.weight.shape:
        return None
    names = {id(module): f"{name}.weight" for name, module in model.named_modules(remove_duplicate=False)}
    head, embedding = names[id(output)], names[id(source)]
    held = reading(model)
    tied, reads = output.weight is source.weight, {held(name) for name in stored.reads.values()}
    if embedding not in reads or not heeds(model.config, not tied):
        return None
    if tied:
        return False if head in reads and not stored.equal(held, head, embedding) else None
    if head in reads:
        return None
    if is_base(model.config):
        raise CheckpointError(f"{stored.folder} {HEADLESS}")
    return True


def _first_names(model: PreTrainedModel, stored: set[str]) -> dict[str, str]:
    """The first name of each tied matrix that is stored under one of its other names alone."""
    ties = {name: source for name, source in model.all_tied_weights_keys.items() if name in stored and source not in stored}
    count = Counter(ties.values())
    return {name: source for name, source in ties.items() if count[source] == 1}


def heeds(config: Any, tied: bool) -> bool:
    """Whether a config of this kind lets itself be told that the head is tied, or is not. Some (DBRX) refuse it."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        told = type(config).from_dict(config.to_diff_dict() | {"tie_word_embeddings": tied})
    except StrictDataclassError:
        return False
    return told.tie_word_embeddings is tied


def _unwrapped(names: list[str], model: Any) -> dict[str, str]:
    """Stored name -> the one that a wrapped model gave its tensor."""
    plain = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in names}
    for before in (PARALLEL, ADAPTED):
        if all(name.startswith(f"{before}.") for name in plain.values()) and before.partition(".")[0] not in _tops(model):
            plain = {name: one.removeprefix(f"{before}.") for name, one in plain.items()}
    return plain


def _tops(model: Any) -> set[str]:
    """What the names of a model's tensors begin with."""
    return {name.partition(".")[0] for name in model.state_dict()}


def _write_weights(
    found: Path, weights: Weights, settlement: Settlement, ties: Mapping[str, str], out: Path, progress: Progress
) -> None:
    """The tensors under their new names and with their new values as safetensors, shard by shard."""
    from safetensors.torch import save_file

    mapping: dict[str, str] = {}
    size = 0
    for number, file in enumerate(weights.files, 1):
        progress.note(f"converting {file} ({number} of {len(weights.files)})")
        shard = f"model-{number:05}-of-{len(weights.files):05}.safetensors" if weights.index else WEIGHTS
        part = Stored(found, replace(weights, files=(file,)), settlement.names, settlement.values)
        tensors = _unshared({settlement.names.get(name, name): tensor for name, tensor in part.tensors()}, ties)
        with saving(out):
            save_file(tensors, out / shard, metadata={"format": "pt"})
        mapping |= dict.fromkeys(tensors, shard)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if weights.index:
        (out / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": mapping}, indent=1))


def _unshared(tensors: Mapping[str, Tensor], ties: Mapping[str, str]) -> dict[str, Tensor]:
    """Contiguous tensors without common storage: the tied copies left out, others that share copied."""
    kept: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        twin = tensors.get(ties.get(name, ""))
        if twin is not None and twin.data_ptr() == tensor.data_ptr() and twin.shape == tensor.shape:
            continue
        storage = tensor.untyped_storage().data_ptr()
        kept[name] = tensor.clone().contiguous() if storage in storages else tensor.contiguous()
        storages.add(storage)
    return kept
