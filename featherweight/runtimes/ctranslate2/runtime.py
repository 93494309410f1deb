"""CTranslate2, declared: decoders and encoder-decoders in int8 rows or floats, on CPUs and CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from featherweight.errors import RecipeError
from featherweight.model.architecture import attention_cap, family_of
from featherweight.model.positions import head_width, rotary_kinds, rotary_switch, rotated_channels, sliding_window
from featherweight.progress import Metrics
from featherweight.runtimes.bounds import EXACT, INT8_ACTIVATIONS, SATURATING, Bound, sixteen_bits
from featherweight.runtimes.ctranslate2 import cublas
from featherweight.runtimes.generation_settings import GenerationSettings
from featherweight.runtimes.interface import Grids, Runtime
from featherweight.runtimes.known_models import names_in
from featherweight.runtimes.refusals import (
    SILU,
    activation_refusal,
    answers_refusal,
    cache_refusal,
    compute_type_refusal,
    float_of_rounded_refusal,
    gpu_refusal,
    on_cpu_refusal,
)
from featherweight.runtimes.spec import FLOATS, SIXTEEN_BITS, ComputeType, ExportSpec
from featherweight.spec import Task
from featherweight.store.served_folder import Serving
from featherweight.system.device import CPU, CUDA, Device
from featherweight.system.machine import INT8_DOT, Machine, cpu_features, describe

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from featherweight.runtimes.bytes_read import HeldTensor
    from featherweight.runtimes.candidate import Candidate
    from featherweight.runtimes.offers import Offer
    from featherweight.runtimes.writing import Source

ROUNDED: tuple[ComputeType, ...] = ("int8", "int8_float16", "int8_bfloat16")
"""int8 weights, and activations that are rounded to int8 at run time."""
COMPUTE_TYPES: tuple[ComputeType, ...] = (*FLOATS, *ROUNDED, "int8_float32")
CUDA_ONLY: tuple[ComputeType, ...] = (*ROUNDED[1:], *SIXTEEN_BITS)
"""What CTranslate2 would compute in float32 on a CPU."""


class CTranslate2Spec(ExportSpec):
    """compute_type: 'int8' stores weights as int8 and rounds activations to int8 at run time; 'int8_float32' stores the same
    weights and computes in float32, a quarter of the size at nearly no loss (CTranslate2's own type of that name is the same as
    its int8 on a CPU, so it is not offered). On CUDA also int8_float16 and int8_bfloat16, which are its own, bfloat16 and float16.
    reduce_range: 7 bits; 'auto' means where it is served from a CPU that has no VNNI. int8 only.
    workers: so many batches are written at once, each with as many threads; a batch alone is split among them.
    shortlist: of an encoder-decoder, write in the commonest tokens of the calibration text's targets and, for each token of the
    source, as many that go with it. Scores do not show what that changes: `workload.changed_answers` does.
    """

    quiet = ExportSpec.quiet | {"workers", "shortlist"}

    engine: Literal["ctranslate2"]
    compute_type: ComputeType = "float32"
    reduce_range: bool | Literal["auto"] = "auto"
    workers: int = Field(1, ge=1, le=256)
    shortlist: int | None = Field(None, ge=1, le=10_000)

    @property
    def changes_texts_alone(self) -> bool:
        return self.shortlist is not None


class CTranslate2(Runtime[CTranslate2Spec]):
    """Everything that is known of it. Metrics of int8 also have `parity_weights_max_abs`, the same with activations in float."""

    name = "ctranslate2"
    spec = CTranslate2Spec
    loads_with = "featherweight.runtimes.ctranslate2.loaded:CTranslate2Model"
    modules = ("ctranslate2",)
    libraries = ("ctranslate2", "torch", "transformers")
    requirements = ("ctranslate2",)
    weight_s = 5e-7
    layers_may_differ = True
    streams = True
    devices = (CPU, CUDA)

    def write(self, spec: CTranslate2Spec, source: Source, out: Path) -> None:
        from featherweight.checkpoint.tokenizer import load_tokenizer
        from featherweight.runtimes.ctranslate2.write import write
        from featherweight.text.tokens import Frame

        if family_of(source.config) == "causal":
            lead = Frame.of(load_tokenizer(source.checkpoint)).lead
            if reason := penalty_refusal(GenerationSettings.read(source.checkpoint), lead):
                raise RecipeError(reason)
        write(spec, source, out)

    def check(self, spec: CTranslate2Spec, source: Source, served: Path) -> Metrics:
        from featherweight.runtimes.ctranslate2.write import check_weights, check_whole

        reference = source.reference()
        weights = check_weights(source, reference, served) if spec.compute_type == "int8" else {}
        source.release()
        return {**weights, **(check_whole(reference, served) if spec.shortlist else reference.check(served))}

    def bound(self, serving: Serving) -> Bound:
        """int8 per token: 0.81 nats at most and 0.071 on average with VNNI or a 7-bit grid; 3.6 and 0.21 on AVX2 without."""
        compute_type = serving.options.get("compute_type", "float32")
        saturates = serving.device == CPU and not INT8_DOT & cpu_features()
        if compute_type == "int8" and serving.grid != "int8-reduced" and saturates:
            return SATURATING
        return INT8_ACTIVATIONS if compute_type in ROUNDED else sixteen_bits(compute_type) or EXACT

    def held_tensors(self, folder: Path, serving: Serving, config: PreTrainedConfig) -> Iterator[HeldTensor]:
        from featherweight.runtimes.ctranslate2.bytes_read import model_tensors

        return model_tensors(folder / "model.bin", serving.options.get("compute_type", "float32"))

    def offers(self, device: Device, machine: Machine) -> Iterator[Offer]:
        from featherweight.runtimes.ctranslate2.offers import offers

        return offers(device, machine)

    def task_refusal(self, task: Task) -> str | None:
        if task == "fill-mask":
            return "its encoders end before the masked-language-model head; take another engine"
        return None

    def grid_refusal(self, grids: Grids, spec: CTranslate2Spec) -> str | None:
        if reason := compute_type_refusal(self.name, COMPUTE_TYPES, spec.compute_type) or cache_refusal(self.name, spec):
            return reason
        if grids.body is None:
            return None
        if spec.compute_type in FLOATS:
            return float_of_rounded_refusal(spec.compute_type) + "; int8_float32 keeps them at 8 bits on disk"
        return _rows_refusal(grids) or _head_refusal(grids, spec)

    def model_refusal(self, spec: CTranslate2Spec, model: Candidate) -> str | None:
        """A model that its converter does not know; windows that it does not compute: it stops beyond them, or sees all before."""
        known = names_in("ctranslate2", "converters/transformers.py", r'@register_loader\("(\w+)"\)')
        if known and model.facts.config_class not in known:
            return f"CTranslate2's converter does not know {model.facts.model_type} models; take another engine"
        if model.facts.model_type in ENCODERS and family_of(model.config) == "causal":
            return f"CTranslate2 reads {model.facts.model_type} models as encoders, and this one writes; take another engine"
        if spec.shortlist and family_of(model.config) != "seq2seq":
            return f"shortlist: it goes by the source of a text, which {model.facts.model_type} models have not; leave it out"
        if spec.workers > 1 and family_of(model.config) == "encoder":
            return "workers: they write texts side by side, and an encoder answers at once; leave them out"
        reason = answers_refusal("CTranslate2", model.config) or _function_refusal(model) or _length_refusal(model)
        return reason or _penalties_refusal(model) or _search_refusal(model)

    def machine_refusal(self, spec: CTranslate2Spec, machine: Machine) -> str | None:
        cuda = spec.compute_type in CUDA_ONLY and not machine.gpus
        return gpu_refusal(self.name, spec.compute_type) if cuda else None

    def device_refusal(self, spec: CTranslate2Spec, device: Device, machine: Machine) -> str | None:
        if device == CPU:
            return on_cpu_refusal(self.name, spec.compute_type) if spec.compute_type in CUDA_ONLY else None
        return cublas.refusal() if machine == describe() else None

    def served_note(self, serving: Serving) -> str | None:
        most = serving.options.get("shortlist")
        return (
            most and f"writes in the commonest tokens and {most} for each token of the source; changed answers show what it costs"
        )

    def machine_note(self, machine: Machine) -> tuple[str, str] | None:
        if machine.int8_dot_product:
            return None
        reason = "no VNNI: CTranslate2's int8 adds pairs of products in int16 and saturates"
        return reason, "keep `reduce_range: auto` in exports, or true"


ENCODERS = frozenset({"bert", "camembert", "distilbert", "roberta", "xlm-roberta"})
"""Model types that its loaders take for encoders, whatever `is_decoder` says."""
ONE_ACTIVATION: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3"), SILU),
    "falcon": ("gelu",),
}
"""What its loaders give the feed-forward layers of a model type, whatever the configuration says."""
_UNSCALED = ("scale_attn_weights", False, "attention that is not scaled by the width of the heads")
OVERLOOKED: dict[str, tuple[tuple[str, bool, str], ...]] = {
    "gpt2": (("scale_attn_by_inverse_layer_idx", True, "attention that is scaled by the number of the layer"), _UNSCALED),
    "gpt_bigcode": (("multi_query", False, "keys and values for every head"), _UNSCALED),
    "opt": (("layer_norm_elementwise_affine", False, "norms without weights of their own"),),
    "bloom": (("apply_residual_connection_post_layernorm", True, "residuals that begin behind the norms"),),
}
"""By model type: what its loaders take no notice of, and the value that makes it something else."""


def _function_refusal(model: Candidate) -> str | None:
    """What a configuration asks to be computed and CTranslate2's layers leave out without a word."""
    config, kind = model.config.get_text_config(), model.facts.model_type
    capped = attention_cap(model.config) or getattr(config, "final_logit_softcapping", None)
    if capped:
        return f"CTranslate2 does not compute {kind}'s soft caps of logits ({capped:g}); take another engine"
    if getattr(config, "qk_layernorm", False):
        return f"CTranslate2 does not compute {kind}'s norms of queries and keys; take another engine"
    if scaled := _scaled_rotations(model):
        what = f"this {kind}'s rotary embeddings ({scaled}) scale what they rotate"
        return f"CTranslate2 scales whole heads, and {what}; take another engine"
    for key, value, what in OVERLOOKED.get(kind, ()):
        if getattr(config, key, None) is value:
            return f"CTranslate2 does not compute {what}, which this {kind} has ({key}); take another engine"
    return activation_refusal("CTranslate2", config, kind, ONE_ACTIVATION)


def _scaled_rotations(model: Candidate) -> str | None:
    """The kind of rotary embeddings that scale the channels that they rotate, where those are not what attention's scale is of."""
    config, told = model.config, getattr(model.config, "rope_parameters", None) or {}
    kinds = rotary_kinds(config) & {"yarn", "longrope"}
    in_part = rotated_channels(config) != head_width(config) or model.facts.model_type == "falcon"
    return min(kinds) if kinds and in_part and told.get("attention_factor") != 1 else None


def _length_refusal(model: Candidate) -> str | None:
    """Where a model begins to compute what CTranslate2 does not: behind a sliding window, or with longrope's other factors."""
    window, switch = sliding_window(model.config), rotary_switch(model.config)
    kind, tokens = model.facts.model_type, model.max_tokens
    if window is not None and tokens > window:
        return (
            f"CTranslate2 does not compute {kind}'s sliding window of {window} tokens, and {tokens} are to be served; "
            f"say max_tokens {window}, or take another engine"
        )
    if switch is not None and tokens > switch:
        return (
            f"CTranslate2 keeps keys as they were rotated first, {kind}'s are others beyond {switch} tokens (longrope), and "
            f"{tokens} are to be served; say max_tokens {switch}, or take another engine"
        )
    return None


def _rows_refusal(grids: Grids) -> str | None:
    """It packs int8 with one scale per row."""
    for grid in (grids.body, grids.head, grids.finer):
        if grid is not None and (grid.bits != 8 or grid.kind != "int"):
            return "CTranslate2 packs int8 and float only"
        if grid is not None and grid.group_size is not None:
            return f"CTranslate2 packs one scale per row, not one per {grid.group_size} weights"
    return None


def _head_refusal(grids: Grids, spec: CTranslate2Spec) -> str | None:
    if spec.compute_type in ROUNDED and grids.head is None:
        return "CTranslate2 would round the float head to int8 at load; quantize the head too, or take int8_float32"
    finest = max(grid.qmax for grid in (grids.body, grids.finer) if grid is not None)
    if spec.reduce_range is True and spec.compute_type == "int8" and finest > 63:
        return "reduce_range wants weights on the grid int8-reduced, and a second rounding is not done here"
    return None


PENALTIES = frozenset({"repetition_penalty", "no_repeat_ngram_size"})
FORBIDDING = PENALTIES | {"suppress_tokens", "bad_words_ids", "min_length", "min_new_tokens"}
"""What changes or forbids tokens before one is chosen."""


def _search_refusal(model: Candidate) -> str | None:
    """What a search of several texts at once makes another one by, as CTranslate2 and transformers weigh them.

    CTranslate2 shares out among the other tokens what is forbidden, transformers leaves it lost; it keeps two candidates for
    each text, which is too few where several tokens end one. A padding token that is forbidden is one that nothing writes.
    """
    told = model.facts.generation
    settings = GenerationSettings.of(told) if told is not None else None
    if settings is None or "num_beams" not in settings.values:
        return None
    padding = [[getattr(told, "pad_token_id", None)]]
    found = sorted(name for name in FORBIDDING.intersection(settings.values) if settings.values[name] != padding)
    if not found and len(set(settings.ends)) < 2:
        return None
    what = found[0] if found else "several ends of a text (eos_token_id)"
    return (
        f"CTranslate2's search of several texts (num_beams) weighs them otherwise than transformers does under {what}, which this "
        "checkpoint's generation_config.json asks for; take another engine, or take one of the two out of that file"
    )


def _penalties_refusal(model: Candidate) -> str | None:
    """The same in the plan, where it is known what the tokenizer puts before a text, or what a target begins with."""
    lead, told, family = model.facts.lead, model.facts.generation, family_of(model.config)
    if told is None or family == "encoder" or (family == "causal" and lead is None):
        return None
    settings = GenerationSettings.of(told)
    return penalty_refusal(settings, [*(lead or ())]) if family == "causal" else _start_refusal(settings, told)


def _start_refusal(settings: GenerationSettings, told: Any) -> str | None:
    """That CTranslate2 does not count the token that a target begins with, which matters where it is an end as well."""
    counted = {"repetition_penalty"} | ({"no_repeat_ngram_size"} if settings.values.get("no_repeat_ngram_size") == 1 else set())
    found = sorted(counted.intersection(settings.values))
    if not found or getattr(told, "decoder_start_token_id", None) not in settings.ends:
        return None
    return (
        f"CTranslate2 does not count the token that a target begins with, here one that ends a text too, in {found[0]}, which "
        "this checkpoint's generation_config.json asks for; take another engine, or take it out of that file"
    )


def penalty_refusal(settings: GenerationSettings, lead: list[int]) -> str | None:
    """Why a checkpoint's penalties are not followed: CTranslate2 does not count the first token of a prompt.

    lead: what its tokenizer puts before a text, which nobody misses where it is no end.
    """
    told = sorted(PENALTIES.intersection(settings.values))
    if not told or (lead and lead[0] not in settings.ends):
        return None
    return (
        f"CTranslate2 does not count a prompt's first token in {told[0]}, which this checkpoint's generation_config.json asks for, "
        "and its tokenizer begins texts with no token that could be missed; take another engine, or take it out of that file"
    )


CTRANSLATE2 = CTranslate2()
