"""Adapters (LoRA) that stay beside one base checkpoint, each under a name, so that a request says which of them answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.adapters import MOVED, factors, initialized, require_factors_of, require_scale
from featherweight.checkpoint.fetching import WORK, look_at, source_of
from featherweight.checkpoint.files import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    KEPT_ADAPTERS,
    Listing,
    Weights,
    adapter_files,
    check_length,
    copy,
    read_header,
    read_json,
)
from featherweight.checkpoint.fit import misfit
from featherweight.checkpoint.inspection import quiet
from featherweight.checkpoint.opening import skeleton
from featherweight.checkpoint.spec import LoadSpec
from featherweight.checkpoint.tensors import require_finite
from featherweight.errors import CheckpointError, one_line, reason
from featherweight.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MERGE = "merge it instead: checkpoint.source is its folder then"
BEYOND = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "fan_in_fan_out",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
)
"""Settings of peft that make of an adapter more than two factors beside linear layers."""

Shapes = Mapping[str, tuple[int, ...]]


def kept_adapters(folder: Path) -> dict[str, Path]:
    """The adapters beside the checkpoint, or the served variant, in `folder`: their own folders, by name."""
    return {path.parent.name: path.parent for path in sorted(folder.glob(f"{KEPT_ADAPTERS}/*/{ADAPTER}"))}


def require_adapters(spec: LoadSpec) -> dict[str, Path]:
    """Look at the adapters of `spec` before anything is loaded, and say where those lie that are here, by their names.

    Raises CheckpointError for one that cannot be kept. What has to be fetched to be seen is looked at by `keep_adapters`.
    """
    here: dict[str, Path] = {}
    for name, source in spec.adapters.items():
        seen = look_at(LoadSpec(source=source))
        if seen is not None:
            _require_plain(name, seen if isinstance(seen, Listing) else Listing.of(seen))
        if isinstance(seen, Path):
            here[name] = seen
    return here


def keep_adapters(spec: LoadSpec, work: Path, out: Path, shapes: Shapes, progress: Progress) -> None:
    """Copy the adapters of `spec` beside the checkpoint in `out`, whose tensors have `shapes`.

    work: an empty folder for what is fetched. Raises CheckpointError for one that does not fit the checkpoint.
    """
    for name, source in spec.adapters.items():
        progress.note(f"keeping adapter {name}")
        place = work / name / WORK
        place.mkdir(parents=True)
        plain = LoadSpec(source=source)
        listing = Listing.of(source_of(plain)[1].fetch(plain, place, progress))
        _require_plain(name, listing)
        require_beside(name, listing, out, shapes)
        require_finite(Path(listing.where), Weights((ADAPTER_WEIGHTS[0],)))
        for file in (ADAPTER, ADAPTER_WEIGHTS[0]):
            copy(Path(listing.where) / file, out / KEPT_ADAPTERS / name / file)


def require_beside(name: str, listing: Listing, checkpoint: Path, shapes: Shapes) -> None:
    """Raises CheckpointError unless the adapter's factors are those that its settings ask for beside the checkpoint."""
    _require_fit(name, listing, shapes)
    _require_placed(name, listing, checkpoint)


def _require_plain(name: str, listing: Listing) -> None:
    """Raises CheckpointError for what is no adapter, or more than two factors beside linear layers."""
    files = adapter_files(listing)
    if ADAPTER not in files:
        raise CheckpointError(f"checkpoint.adapters.{name}: {listing.where} holds no {ADAPTER}; give the folder that peft saved")
    if ADAPTER_WEIGHTS[0] not in files:
        raise CheckpointError(f"checkpoint.adapters.{name}: {listing.where} holds no {ADAPTER_WEIGHTS[0]}; save it as safetensors")
    if reason := _beyond(told := read_json(listing, ADAPTER)):
        raise CheckpointError(f"checkpoint.adapters.{name}: {reason}; {MERGE}")
    require_scale(f"{listing.where}/{ADAPTER}", told)
    check_length(listing, ADAPTER_WEIGHTS[0])
    require_factors_of(listing, {})


def _beyond(told: Mapping[str, Any]) -> str | None:
    """Why an adapter of these settings can only be merged; None for a LoRA of linear layers alone."""
    if told.get("peft_type") != "LORA":
        return f"adapters of type {told.get('peft_type')} are not kept beside a model, LoRA's alone are"
    if told.get("bias", "none") != "none":
        return "it has trained biases, which are not kept beside a model"
    if initialized(told).startswith(MOVED):
        return f"it takes from the base's weights what it began with (init_lora_weights: {initialized(told)})"
    beyond = next((key for key in BEYOND if told.get(key)), None)
    return beyond and f"it says {beyond}, which no engine takes beside a model"


def _require_fit(name: str, listing: Listing, shapes: Shapes) -> None:
    """Raises CheckpointError unless each factor belongs to a matrix of the checkpoint, and has its rows or columns."""
    for tensor, factor in factors(listing).items():
        shape = shapes.get(factor.matrix) if factor else None
        if factor is None or shape is None or len(shape) != 2:
            raise CheckpointError(f"checkpoint.adapters.{name}: {tensor} belongs to no matrix of the checkpoint; {MERGE}")
        wanted = shape[1] if factor.first else shape[0]
        if factor.channels != wanted:
            raise CheckpointError(
                f"checkpoint.adapters.{name}: {tensor} is of {factor.channels} channels and {factor.matrix} of {wanted}; "
                "it was trained on another base"
            )


def _require_placed(name: str, listing: Listing, checkpoint: Path) -> None:
    """Raises CheckpointError where peft, by the adapter's settings, has other factors beside the checkpoint than the file holds: it
    leaves out what it has no place for, begins anew what is missing, and only warns.
    """
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    try:
        with quiet():
            settings = PeftConfig.from_pretrained(listing.where)
            wanted = get_peft_model_state_dict(get_peft_model(skeleton(checkpoint), settings))
    except Exception as error:  # each kind of adapter fails in its own way
        raise CheckpointError(f"checkpoint.adapters.{name}: it does not load beside its base: {reason(error)}") from error
    shapes = {tensor: tuple(value.shape) for tensor, value in wanted.items()}
    held = {tensor: tuple(entry["shape"]) for tensor, entry in read_header(listing, ADAPTER_WEIGHTS[0]).items()}
    if wrong := misfit(held, shapes):
        tensor, found, asked = wrong
        raise CheckpointError(
            f"checkpoint.adapters.{name}: {tensor} has the shape {found} in its file, and {ADAPTER} asks for {asked}; "
            "copy both again"
        )


@contextmanager
def adapted(model: PreTrainedModel, adapter: Path) -> Iterator[PreTrainedModel]:
    """`model` as it computes with an adapter beside its weights, by peft; without it again at the end of the block."""
    from peft import PeftModel

    try:
        with quiet():
            wrapped: Any = PeftModel.from_pretrained(model, str(adapter), local_files_only=True).eval()
    except Exception as error:  # each kind of adapter fails in its own way
        raise CheckpointError(f"adapter {adapter.name} does not load beside its base: {one_line(error)}") from error
    try:
        yield wrapped.get_base_model()
    finally:
        wrapped.unload()
        if hasattr(model, "peft_config"):
            del model.peft_config


def beside(model: PreTrainedModel, adapters: Mapping[str, Path]) -> Callable[[str | None], None]:
    """Put adapters beside `model` for good; what comes back chooses one by its name, or the model alone by None."""
    from peft import PeftModel

    numbers = {name: f"n{number}" for number, name in enumerate(adapters)}  # peft takes no dots in a name
    wrapped: Any = None
    for name, folder in adapters.items():
        if wrapped is None:
            wrapped = PeftModel.from_pretrained(model, str(folder), adapter_name=numbers[name], local_files_only=True)
        else:
            wrapped.load_adapter(str(folder), adapter_name=numbers[name], local_files_only=True)
    wrapped.eval()

    def choose(name: str | None) -> None:
        if name is None:
            wrapped.base_model.disable_adapter_layers()
            return
        wrapped.base_model.enable_adapter_layers()
        wrapped.set_adapter(numbers[name], inference_mode=True)

    return choose
