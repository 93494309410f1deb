"""The configuration that a GGUF file describes: what transformers makes of it, put right by what else the file says.

transformers 5.17 reads some settings of each architecture and leaves the others at its own defaults, which are those of one model:
StarCoder2's base of rotary embeddings, Nemotron's epsilon, Phi-3's window. Tensors that it has no place for, a Llama's biases, it
leaves out. The settings are those of ggml's docs/gguf.md; what llama.cpp knows by a tensor's being there, or by the number of
layers, is told by these.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.checkpoint.gguf_header import ARCHITECTURE, GgufHeader
from featherweight.checkpoint.gguf_rotary import FACTORS
from featherweight.checkpoint.patches import read_once
from featherweight.errors import CheckpointError
from featherweight.model.positions import head_width, rotated_channels

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
EPSILONS = ("norm_eps", "norm_epsilon", "layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps")
NAMES: Mapping[str, tuple[str, ...]] = {
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "feed_forward_length": ("ffn_hidden_size", "n_inner", "intermediate_size"),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads"),
    **dict.fromkeys(("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"), EPSILONS),
    "attention.sliding_window": ("sliding_window",),
    **{name: (name,) for name in CAPS},
    "vocab_size": ("vocab_size",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_feed_forward_length": ("moe_intermediate_size", "intermediate_size"),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_weights_norm": ("norm_topk_prob",),
    "use_parallel_residual": ("use_parallel_residual",),
    "shortconv.l_cache": ("conv_L_cache",),
    "ssm.conv_kernel": ("conv_kernel",),
    "ssm.state_size": ("state_size",),
    "ssm.time_step_rank": ("time_step_rank",),
    "ssm.inner_size": ("intermediate_size",),
}
"""A file's setting, and transformers' names for it, of which a configuration has one."""
REQUIRED = (
    ("context_length",),
    ("embedding_length",),
    ("block_count",),
    ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"),
)
"""What llama.cpp reads no model without, one of each; transformers took its own defaults."""
HEADS = ("attention.key_length", "attention.value_length")
BASE = "rope.freq_base"
USUAL_BASE = 10_000.0
"""Of a file that says none, to llama.cpp."""
BASES = {"rope.freq_base": "full_attention", "rope.freq_base_swa": "sliding_attention"}
"""Of rotary embeddings, and the layers that they are of where those differ."""
PERIOD = "attention.sliding_window_pattern"
SCALES = ("expert_weights_scale", "logit_scale", "residual_scale", "embedding_scale")
CAUSAL, SOFTMAX = "attention.causal", 1.0
CONSTANTS = {
    CAUSAL: 1.0,
    "attention.max_alibi_bias": 8.0,
    "expert_gating_func": SOFTMAX,
    **dict.fromkeys(SCALES, 1.0),
}
"""What transformers computes with whatever is said."""
ELSEWHERE = ("context_length", "tensor_data_layout", "pooling_type", "rope.scale_linear", "rope.dimension_count")
"""What changes nothing, and what is read by itself: see gguf_rotary.py and below."""
PARTS = ("rope.scaling.", "mm.", "vision.", "audio.")
"""How names begin of what is read by itself, and of what is not about text."""
TABLES: Mapping[str, Mapping[str, tuple[str, ...]]] = {"gpt2": {"context_length": ("n_positions",)}}
"""By architecture: what is a size there alone, of a table of positions."""
READ: Mapping[str, tuple[str, ...]] = {
    "lfm2": ("attention.head_count_kv",),
    "minimax-m2": ("expert_gating_func",),
    "stablelm": ("use_parallel_residual",),
}
"""By architecture: what transformers makes something of its own of."""
AS_THEY_ARE = ("llama", "nemotron", "gemma2", "gemma3")
"""Architectures of which transformers changes tensors as it reads them, and no shapes."""
VOCABULARY = ("token_embd.weight", "output.weight")
OWN_READER = ("qwen35",)
"""Architectures of which transformers' newer reader takes all settings and tensors, or fails."""
ENDS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
"""Of a turn, and of a message that a tool is to answer."""
BIASES = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias", "use_bias": "blk.0.attn_q.bias"}
"""Entries of a configuration, and the tensor that tells whether they hold."""
DEEPEST = {"gemma2": 46, "gemma3": 62}
"""How many layers the model has that scales attention by its own width shared out to the heads."""
CLOSE = 1e-6
INSTEAD = "it would be another model; give the folder that the file was made from"


def configuration(folder: Path, name: str, header: GgufHeader) -> PreTrainedConfig:
    """The configuration of the file `name` in a folder, whose header says `header`.

    Raises CheckpointError where it says what no configuration of its kind can.
    """
    from transformers import AutoConfig

    architecture = str(header.text(ARCHITECTURE))
    _require_said(header, architecture)
    config: Any = AutoConfig.from_pretrained(folder, gguf_file=name, local_files_only=True)
    if header.text(ARCHITECTURE) not in OWN_READER:
        put_right(config, header)
    _set_ends(config, header)
    return config


def _require_said(header: GgufHeader, architecture: str) -> None:
    """Refuse a file that leaves out what llama.cpp reads no model without, or says it in other than one number."""
    if architecture in OWN_READER:
        return
    for names in REQUIRED:
        if not any(f"{architecture}.{name}" in header.settings for name in names):
            raise CheckpointError(f"it does not say {architecture}.{names[0]}; convert the model again")
    for name in NAMES:
        key = f"{architecture}.{name}"
        if key in header.settings and header.number(key) is None and name not in READ.get(architecture, ()):
            what = "a number for each layer" if header.numbers(key) is not None else "no number"
            raise CheckpointError(f"{key} is {what}, which no {architecture} of transformers takes: {INSTEAD}")


def _set_ends(config: Any, header: GgufHeader) -> None:
    """Have texts end where llama.cpp ends them: at the end of a turn too, which the checkpoint's generation_config.json named."""
    told = config.eos_token_id
    first = told if isinstance(told, list) else [] if told is None else [told]
    more = [int(number) for name in ENDS if (number := header.number(name)) is not None and number >= 0]
    ends = list(dict.fromkeys([*first, *more]))
    if len(ends) > len(first):
        config.eos_token_id = ends if len(ends) > 1 else ends[0]


def put_right(config: Any, header: GgufHeader) -> None:
    """Have `config` say what the file says."""
    if config.is_encoder_decoder:
        raise CheckpointError(f"a {config.model_type} is not read from GGUF files; give the folder that the file was made from")
    architecture = str(header.text(ARCHITECTURE))
    _set_width(config, header, architecture)
    for name in _names(header, architecture):
        _put(config, name, header.numbers(f"{architecture}.{name}"), f"{architecture}.{name}")
    if f"{architecture}.{BASE}" not in header.settings:
        _set_base(config, BASES[BASE], USUAL_BASE)
    _set_rotated(config, header.number(f"{architecture}.rope.dimension_count"), architecture)
    for entry, tensor in BIASES.items():
        if hasattr(config, entry):
            setattr(config, entry, tensor in header.tensors)
    if deepest := DEEPEST.get(architecture):
        whole = config.hidden_size // config.num_attention_heads
        config.query_pre_attn_scalar = whole if config.num_hidden_layers == deepest else head_width(config)


def _names(header: GgufHeader, architecture: str) -> Iterator[str]:
    """The settings that are to be held to a configuration."""
    for key in sorted(header.settings):
        name = key.removeprefix(f"{architecture}.")
        passed_by = name in (*ELSEWHERE, *HEADS, *READ.get(architecture, ())) or name.startswith(PARTS)
        if key.startswith(f"{architecture}.") and (name in TABLES.get(architecture, ()) or not passed_by):
            yield name


def _set_width(config: Any, header: GgufHeader, architecture: str) -> None:
    """Channels of a head, of keys and of values alike."""
    told = {header.number(f"{architecture}.{name}") for name in HEADS} - {None, 0.0}
    if len(told) > 1:
        raise CheckpointError(f"keys and values have heads of two widths ({architecture}.attention.*_length): {INSTEAD}")
    for width in told:
        if width != head_width(config):
            config.head_dim = int(width or 0)


def _put(config: Any, name: str, values: list[float] | None, key: str) -> None:
    """One setting, which may be an array with a value for each layer."""
    if name == PERIOD and values:
        _set_kinds(config, values)
        return
    value = values[0] if values and len(set(values)) == 1 else math.nan
    if value == 0 and name != CAUSAL:
        return  # it stands for none
    if math.isnan(value) or not _taken(config, name, value):
        shown = "" if math.isnan(value) else f" is {value:g}"
        raise CheckpointError(f"{key}{shown}, which transformers takes no notice of in GGUF files: {INSTEAD}")


def _taken(config: Any, name: str, value: float) -> bool:
    """Whether the configuration says it now."""
    if name in CONSTANTS:
        return value == CONSTANTS[name]
    if name in BASES:
        return _set_base(config, BASES[name], value)
    names = NAMES.get(name) or TABLES.get(config.model_type, {}).get(name, ())
    entry = next((entry for entry in names if hasattr(config, entry)), None)
    was = _assumed(config, name, entry)
    if was is not None and math.isclose(was, value, rel_tol=CLOSE):
        return True
    if entry is None or name == "attention.head_count_kv":  # that transformers reads, where it is not fixed
        return False
    kind = type(was) if isinstance(was, bool | float) else float if name in CAPS else int
    setattr(config, entry, kind(value))
    return True


def _assumed(config: Any, name: str, entry: str | None) -> Any:
    """What the configuration says of it, without a word where it has no entry."""
    if name == "attention.head_count_kv" and getattr(config, "multi_query", False):
        return config.num_kv_heads if getattr(config, "new_decoder_architecture", False) else 1
    said = None if entry is None else getattr(config, entry)
    if said is None and name == "feed_forward_length":
        return 4 * config.hidden_size
    return config.num_attention_heads if said is None and name == "attention.head_count_kv" else said


def _set_base(config: Any, layers: str, value: float) -> bool:
    """A model without rotary embeddings has none, whatever is said."""
    told = getattr(config, "rope_parameters", None) or {}
    of_layers = told.get(layers, told if layers == "full_attention" else None)
    if of_layers is None:
        return not told
    if not math.isclose(of_layers.get("rope_theta") or 0.0, value, rel_tol=CLOSE):
        of_layers["rope_theta"] = value
    return True


def _set_rotated(config: Any, count: float | None, architecture: str) -> None:
    """How many channels of each head rotary embeddings turn."""
    width = head_width(config)
    if not count or not width or not getattr(config, "rope_parameters", None) or count == rotated_channels(config):
        return
    if "partial_rotary_factor" not in config.rope_parameters:
        raise CheckpointError(
            f"{architecture}.rope.dimension_count is {count:g} of heads of {width}, which a {config.model_type} of transformers "
            f"does not have: {INSTEAD}"
        )
    config.rope_parameters["partial_rotary_factor"] = count / width


def _set_kinds(config: Any, values: list[float]) -> None:
    """Which layers have a window: a truth for each, or the period of those that have none."""
    count = config.num_hidden_layers
    limited = [(layer + 1) % values[0] != 0 for layer in range(count)] if len(values) == 1 and count > 1 else map(bool, values)
    config.layer_types = ["sliding_attention" if one else "full_attention" for one in limited]


def misplaced(config: Any, header: GgufHeader) -> str | None:
    """Which tensor of a file transformers would leave out, or lack, in a model of this configuration; None where all is read."""
    architecture = str(header.text(ARCHITECTURE))
    if architecture in OWN_READER:
        return None
    model, places = _places(config, architecture)
    found = {name: places.get(name, places.get(name.removesuffix(".weight"))) for name in header.tensors}
    beyond = next((name for name, place in found.items() if place is None and not _by_itself(name, architecture)), None)
    if beyond:
        return f"{beyond} has no place in {type(model).__name__}, so that transformers leaves it out: {INSTEAD}"
    taken = {*found.values(), *(model.all_tied_weights_keys or ())}
    lacking = next((name for name in model.state_dict() if name not in taken and not _gpt2_head(name, header)), None)
    if lacking:
        return f"it has nothing for {lacking} of {type(model).__name__}; convert the model again"
    return _misshapen(model, {name: place for name, place in found.items() if place}, header, architecture)


def _misshapen(model: Any, places: Mapping[str, str], header: GgufHeader, architecture: str) -> str | None:
    """That a tensor has another shape than the settings ask for; of those that are put together or turned, another size."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS

    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    exact, times = architecture in AS_THEY_ARE or architecture not in TENSOR_PROCESSORS, Counter(places.values())
    counted = f"{architecture}.vocab_size" in header.settings
    for name, shape in header.shapes.items():
        asked = wanted.get(places.get(name, ""))
        if asked is None or times[places[name]] > 1:
            continue
        if name in VOCABULARY and not counted:  # by the tokenizer's lists, which a plan leaves out
            shape, asked = shape[1:], asked[1:]
        if shape != asked and (exact or math.prod(shape) != math.prod(asked)):
            return f"{name} has shape {list(shape)}, and the file's settings ask for {list(asked)}; copy it, or convert it, again"
    return None


def _places(config: Any, architecture: str) -> tuple[Any, Mapping[str, str]]:
    """A model without memory, and where transformers puts a file's tensors in it."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with read_once():
        return model, get_gguf_hf_weights_map(model, TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=config.to_dict()))


def _by_itself(name: str, architecture: str) -> bool:
    """What is read by gguf_rotary.py, or is GPT-2's head, which transformers puts where it belongs by its name."""
    return name in FACTORS or (architecture == "gpt2" and name == "output.weight")


def _gpt2_head(name: str, header: GgufHeader) -> bool:
    return name == "lm_head.weight" and "output.weight" in header.tensors
