"""Where a transformer keeps its parts: stacks of blocks, the attentions and the feed-forward network of each.

What prunes, distils or quantizes by structure asks here, and so works alike on decoders, encoders and encoder-decoders. A new
model type is one line in a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, cast

from featherweight.errors import StageError
from featherweight.spec import HEADED, Task

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

Family = Literal["causal", "seq2seq", "encoder"]
Role = Literal["decoder", "encoder"]


@dataclass(frozen=True)
class Attention:
    """One attention of a block. Query heads share `kv_heads` key/value heads; o takes heads * head_dim channels in.

    norm: what feeds it and nothing else; None in a post-norm block, whose norms feed the residual too.
    """

    name: str
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    heads: int
    kv_heads: int
    head_dim: int
    module: nn.Module
    norm: nn.Module | None


@dataclass(frozen=True)
class FeedForward:
    """The MLP of a block: a hidden channel is a row of every matrix of `inputs` and a column of `output`.

    proportional: that of `inputs` whose channels, scaled, scale those that `output` reads: beside a gate or behind a ReLU.
    norm: as in Attention.
    """

    name: str
    inputs: tuple[nn.Linear, ...]
    output: nn.Linear
    proportional: nn.Linear | None
    norm: nn.Module | None


@dataclass(frozen=True)
class Block:
    """One layer of a stack; `name` is its module's name in the model. A decoder of an encoder-decoder has two attentions."""

    name: str
    module: nn.Module
    attentions: tuple[Attention, ...]
    feed_forward: FeedForward


@dataclass(frozen=True)
class Stack:
    """Blocks that run one after another. `layers` is the list that holds them, `count` the config's name of their number."""

    role: Role
    layers: nn.ModuleList
    count: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Dimensions:
    """What a config says of each block of a stack, and under which names (`layers_key` ...).

    free_heads: the config has a head width of its own, so the number of heads can change without the hidden size.
    """

    role: Role
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    channels: int
    layers_key: str
    heads_key: str
    channels_key: str
    free_heads: bool


@dataclass(frozen=True)
class _Layout:
    """Names inside a model type, below its base model. attentions: path in a block -> names of q, k, v, o below it.

    norms: path of an attention, or MLP, -> the norm that feeds it alone; empty where blocks are post-norm.
    """

    role: Role
    layers: str
    count: str
    attentions: Mapping[str, tuple[str, str, str, str]]
    inputs: tuple[str, ...]
    output: str
    heads: str = "num_attention_heads"
    head_dim: str | None = None
    channels: str = "intermediate_size"
    activation: str = "hidden_act"
    norms: Mapping[str, str] = field(default_factory=dict)


MLP = "mlp"
_QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
_BART = ("q_proj", "k_proj", "v_proj", "out_proj")
_T5 = ("q", "k", "v", "o")
_LLAMA = (
    _Layout(
        "decoder",
        "layers",
        "num_hidden_layers",
        {"self_attn": _QKVO},
        ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down_proj",
        head_dim="head_dim",
        norms={"self_attn": "input_layernorm", MLP: "post_attention_layernorm"},
    ),
)
_BART_POST_NORM = (
    _Layout(
        "encoder",
        "encoder.layers",
        "encoder_layers",
        {"self_attn": _BART},
        ("fc1",),
        "fc2",
        "encoder_attention_heads",
        channels="encoder_ffn_dim",
        activation="activation_function",
    ),
    _Layout(
        "decoder",
        "decoder.layers",
        "decoder_layers",
        {"self_attn": _BART, "encoder_attn": _BART},
        ("fc1",),
        "fc2",
        "decoder_attention_heads",
        channels="decoder_ffn_dim",
        activation="activation_function",
    ),
)
_BART_NORMS = {"self_attn": "self_attn_layer_norm", "encoder_attn": "encoder_attn_layer_norm", MLP: "final_layer_norm"}
_BART_PRE_NORM = tuple(replace(layout, norms=_BART_NORMS) for layout in _BART_POST_NORM)
_SEQ2SEQ_T5 = (
    _Layout(
        "encoder",
        "encoder.block",
        "num_layers",
        {"layer.0.SelfAttention": _T5},
        ("layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wi_0", "layer.1.DenseReluDense.wi_1"),
        "layer.1.DenseReluDense.wo",
        "num_heads",
        "d_kv",
        "d_ff",
        "dense_act_fn",
        {"layer.0.SelfAttention": "layer.0.layer_norm", MLP: "layer.1.layer_norm"},
    ),
    _Layout(
        "decoder",
        "decoder.block",
        "num_decoder_layers",
        {"layer.0.SelfAttention": _T5, "layer.1.EncDecAttention": _T5},
        ("layer.2.DenseReluDense.wi", "layer.2.DenseReluDense.wi_0", "layer.2.DenseReluDense.wi_1"),
        "layer.2.DenseReluDense.wo",
        "num_heads",
        "d_kv",
        "d_ff",
        "dense_act_fn",
        {
            "layer.0.SelfAttention": "layer.0.layer_norm",
            "layer.1.EncDecAttention": "layer.1.layer_norm",
            MLP: "layer.2.layer_norm",
        },
    ),
)
_BERT = (
    _Layout(
        "encoder",
        "encoder.layer",
        "num_hidden_layers",
        {"attention": ("self.query", "self.key", "self.value", "output.dense")},
        ("intermediate.dense",),
        "output.dense",
    ),
)
_DISTILBERT = (
    _Layout(
        "encoder",
        "transformer.layer",
        "n_layers",
        {"attention": ("q_lin", "k_lin", "v_lin", "out_lin")},
        ("ffn.lin1",),
        "ffn.lin2",
        "n_heads",
        channels="hidden_dim",
        activation="activation",
    ),
)

LAYOUTS: Mapping[str, tuple[_Layout, ...]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    **dict.fromkeys(("bart", "marian"), _BART_POST_NORM),
    **dict.fromkeys(("mbart", "m2m_100", "pegasus"), _BART_PRE_NORM),
    **dict.fromkeys(("t5", "mt5"), _SEQ2SEQ_T5),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    "mpnet": (replace(_BERT[0], attentions={"attention.attn": ("q", "k", "v", "o")}),),
    "distilbert": _DISTILBERT,
}
"""Where each model type keeps its stacks, an encoder before its decoder."""

GATED_DECODERS = tuple(name for name, layouts in LAYOUTS.items() if layouts is _LLAMA)
"""Model types whose blocks are those of a Llama: causal, gated MLP, grouped-query attention."""

PRE_NORM = tuple(name for name, layouts in LAYOUTS.items() if all(layout.norms for layout in layouts))
"""Model types whose norms feed one sublayer each, and nothing else."""


_HEADS: Mapping[str, Task] = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForMaskedLM": "fill-mask",
    "ForPreTraining": "fill-mask",
}
"""What encoders are for, by the endings of their architectures; one without a head is for embeddings."""


EMBEDDING = "sentence_embedding"
"""Where a checkpoint's config says how its vectors are made; transformers keeps what it does not know."""


def family_of(config: PreTrainedConfig) -> Family:
    """How a checkpoint reads: on from a prefix (causal), from a text to a text (seq2seq), or a whole text at once (encoder).

    A decoder whose vectors are asked for, and not its next tokens, is an encoder here.
    """
    if getattr(config, EMBEDDING, None):
        return "encoder"
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    kinds = getattr(config, "architectures", None) or []
    one_way = any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds)
    bidirectional = any(kind.endswith(tuple(_HEADS)) for kind in kinds) or _fills_masks(config)
    return "encoder" if bidirectional or (not one_way and _reads_both_ways(config)) else "causal"


def _fills_masks(config: PreTrainedConfig) -> bool:
    """Whether a class that stands for both ways of reading (XLM's, FlauBERT's) reads whole texts, as its configuration says."""
    kinds = getattr(config, "architectures", None) or []
    return any(kind.endswith("WithLMHeadModel") for kind in kinds) and not getattr(config, "causal", True)


def encoder_classes(config: PreTrainedConfig) -> tuple[str | None, str | None]:
    """Names of transformers' classes for this model type: the base model's, and of the one that fills masks, where there is one."""
    told = getattr(config, "encoder_classes", None)
    if told is not None:  # described where transformers is at hand
        return tuple(told)
    auto = auto_names()
    base: Any = auto.MODEL_MAPPING_NAMES.get(config.model_type)
    return (base[0] if isinstance(base, tuple) else base), auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(config.model_type)


def auto_names() -> Any:
    """transformers' own module of the names of its classes, which `from transformers.models.auto import` has not without torch."""
    return import_module("transformers.models.auto.modeling_auto")


def class_by_type(config: PreTrainedConfig) -> str | None:
    """What transformers opens a decoder with by its model type, where what the config names first is no class of that type, or is
    the base model beside others.

    None where it is one, where there is none for the type, and for what is no decoder: that is opened by its task.
    """
    first, *others = getattr(config, "architectures", None) or [""]
    taken = first in _classes(config.model_type) and not (others and first == encoder_classes(config)[0])
    if taken or family_of(config) != "causal":
        return None
    return auto_names().MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)


def _classes(model_type: str) -> set[str]:
    """Names of all of transformers' models of that type."""
    mappings = (made for kind, made in vars(auto_names()).items() if kind.endswith("_MAPPING_NAMES"))
    found = [made.get(model_type) for made in mappings]
    return {name for one in found if one for name in ([one] if isinstance(one, str) else one)}


def _reads_both_ways(config: PreTrainedConfig) -> bool:
    """Whether a model of this type is an encoder: by the table, else by whether transformers fills masks with it."""
    if getattr(config, "is_encoder_decoder", False):
        return False
    if config.model_type in LAYOUTS:
        return LAYOUTS[config.model_type][-1].role == "encoder"
    return encoder_classes(config)[1] is not None


def answers_by_decoder(config: PreTrainedConfig) -> bool:
    """Whether vectors or labels are made of what a decoder reads."""
    return task_of(config) in HEADED and not _reads_both_ways(config)


def task_of(config: PreTrainedConfig) -> Task:
    """What a checkpoint is for, by the head that its config names."""
    family, kinds = family_of(config), getattr(config, "architectures", None) or []
    if family != "encoder":
        return "text-generation" if family == "causal" else "text2text-generation"
    if _fills_masks(config):
        return "fill-mask"
    named = (task for ending, task in _HEADS.items() if any(kind.endswith(ending) for kind in kinds))
    return next(named, "feature-extraction" if kinds else "fill-mask")


def head_refusal(config: PreTrainedConfig) -> str | None:
    """Why the head that a config names is not taken, in one line; None where it is."""
    kinds = getattr(config, "architectures", None) or []
    ending = next((one for one in _NOT_TAKEN if any(kind.endswith(one) for kind in kinds)), None)
    if ending:
        return f"its head ({kinds[0]}) answers for no task that is known here; known heads: {', '.join(_HEADS)}"
    if any(kind.endswith("EncoderModel") for kind in kinds) and not _reads_both_ways(config):
        return f"it is the encoder of an encoder-decoder alone ({kinds[0]}), which is not taken; give the whole model"
    if kinds and family_of(config) == "causal" and len(LAYOUTS.get(config.model_type, ())) > 1:
        return f"it is the decoder of an encoder-decoder alone ({kinds[0]}), which is not taken; give the whole model"
    labels = any(kind.endswith(tuple(_HEADS)[:2]) for kind in kinds)
    if labels and (reason := _by_decoder_refusal(config, kinds[0]) or _labels_refusal(config)):
        return reason
    named = scored_by(config) if config.num_labels == 1 else ""
    if named and not (named.startswith("torch.") and named.endswith(ACTIVATIONS)):
        return f"its scores go through {named}, which is not done here; known: {', '.join(ACTIVATIONS)}"
    return None


def _by_decoder_refusal(config: PreTrainedConfig, kind: str) -> str | None:
    """Why labels are not taken from a model that is no encoder; None of decoders that give them as most do."""
    if _reads_both_ways(config):
        return None
    if getattr(config, "is_encoder_decoder", False):
        return f"it labels texts with an encoder-decoder ({kind}), which is not taken; take an encoder or a decoder"
    if config.model_type not in auto_names().MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or config.model_type in OWN_LABELS:
        return f"how it labels texts ({kind}) is not known here; take an encoder, or a decoder such as a Llama"
    return None


def _labels_refusal(config: PreTrainedConfig) -> str | None:
    """That labels have no name, so that transformers' pipelines fail as soon as one of them is the likeliest."""
    numbers = sorted(int(number) for number in getattr(config, "id2label", None) or ())
    if numbers == list(range(len(numbers))):
        return None
    found = ", ".join(map(str, numbers[:8]))
    return f"id2label names the labels {found}, and there are 0 to {len(numbers) - 1}; name each of them in config.json"


ACTIVATIONS = ("Sigmoid", "Identity")
"""What sentence-transformers puts behind a cross-encoder of one label, as far as that is done here; the first by itself."""


def scored_by(config: PreTrainedConfig) -> str:
    """The activation that a cross-encoder's config names, as releases of sentence-transformers from 4.0 on and before wrote it."""
    told = getattr(config, "sentence_transformers", None) or {}
    return str(told.get("activation_fn") or getattr(config, "sbert_ce_default_activation_function", None) or "")


def medium_refusal(config: PreTrainedConfig) -> str | None:
    """Why a model that transformers neither writes texts with nor reads them with is not taken, in one line; None of others."""
    kinds, family = getattr(config, "architectures", None) or [], family_of(config)
    if (
        family == "encoder"
        or getattr(config, "auto_map", None)
        or head_refusal(config)  # which says more
        or any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds)
    ):
        return None
    auto = auto_names()
    decoders, both = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    if config.model_type in (decoders if family == "causal" else both):
        return None
    named = f"a {config.model_type} model" + (f" ({kinds[0]})" if kinds else "")
    return f"{named} is none that transformers reads or writes texts with alone; take a language model"


OWN_LABELS = ("cohere_compass_text", "ctrl", "gemma3", "modernbert-decoder", "qwen3_5", "xlnet")
"""Model types of decoders whose labels are no `score` of the last token that is read, or that see images too."""
_NOT_TAKEN = ("ForQuestionAnswering", "ForMultipleChoice", "ForNextSentencePrediction")


_ROLES: Mapping[Task, tuple[tuple[Role, ...], ...]] = {
    "text-generation": (("decoder",),),
    "text2text-generation": (("encoder", "decoder"),),
    "fill-mask": (("encoder",),),
    **dict.fromkeys(HEADED, (("encoder",), ("decoder",))),
}


def model_types(task: Task) -> tuple[str, ...]:
    """The model types of the table that are made for `task`."""
    return tuple(name for name, layouts in LAYOUTS.items() if tuple(layout.role for layout in layouts) in _ROLES[task])


def auto_class(config: PreTrainedConfig) -> Any:
    """transformers' Auto class that opens a checkpoint of this config with the head of its task."""
    import transformers

    names: Mapping[Task, str] = {
        "text-generation": "AutoModelForCausalLM",
        "text2text-generation": "AutoModelForSeq2SeqLM",
        "fill-mask": "AutoModelForMaskedLM",
        "text-classification": "AutoModelForSequenceClassification",
        "token-classification": "AutoModelForTokenClassification",
    }
    task = task_of(config)
    return getattr(transformers, names[task]) if task in names else _auto_encoder()


@cache
def _auto_encoder() -> Any:
    """AutoModel without the pooler that next-sentence prediction needs: no embedding is read from it, and many files lack it."""
    from transformers import AutoModel

    class AutoEncoder:
        _model_mapping = AutoModel._model_mapping

        @staticmethod
        def from_pretrained(*arguments: Any, **options: Any) -> Any:
            return without_pooler(AutoModel.from_pretrained(*arguments, **options))

        @staticmethod
        def from_config(*arguments: Any, **options: Any) -> Any:
            return without_pooler(AutoModel.from_config(*arguments, **options))

    return AutoEncoder


def without_pooler(model: Any) -> Any:
    """The same base model, its pooler gone."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = _nothing() if model.config.model_type in POOLS_ALWAYS else None
    return model


POOLS_ALWAYS = ("layoutlm", "squeezebert")
"""Model types that call their pooler without asking whether there is one."""


def _nothing() -> Any:
    """A module that answers None to whatever it is given."""
    from torch import nn

    class Nothing(nn.Module):
        def forward(self, *_: Any) -> None:
            return None

    return Nothing()


LOOKS_AHEAD = ("umt5",)
"""Model types whose decoders see the tokens that follow, where transformers leaves the mask to SDPA."""


def attention_options(config: PreTrainedConfig) -> dict[str, str]:
    """What transformers is to be told so that the attention is the one of `config`: nothing, where its own choice is.

    SDPA, which it chooses by itself, leaves out soft caps (as Gemma 2 has them) without a word; and it lets umT5's decoder look
    ahead, whose attention does not say that it is causal (transformers 5.17).
    """
    return {"attn_implementation": "eager"} if attention_cap(config) or config.model_type in LOOKS_AHEAD else {}


def eager_differs(config: PreTrainedConfig) -> bool:
    """Whether transformers' eager attention is not the model's: Falcon's adds its ALiBi bias twice (transformers 5.17)."""
    return config.model_type == "falcon" and bool(getattr(config, "alibi", False))


def attention_cap(config: Any) -> float | None:
    """What the logits of attention are capped by, in the model or a stack of it; None for no cap."""
    told = config.get_text_config().to_dict()
    parts = (told, *(part for name in ("encoder", "decoder") if isinstance(part := told.get(name), dict)))
    return next((cap for part in parts if (cap := part.get("attn_logit_softcapping"))), None)


def head_class(config: PreTrainedConfig) -> Any:
    """The very class that `auto_class` chooses; None where transformers has none for this config.

    Where it has several (Funnel's, with and without a decoder), the one that the config names, else the first, as it does itself.
    """
    made = auto_class(config)._model_mapping.get(type(config), None)
    if not isinstance(made, tuple | list):
        return made
    return next((one for one in made if one.__name__ in (config.architectures or [])), made[0])


def stacks(model: PreTrainedModel) -> tuple[Stack, ...]:
    """The stacks of blocks of a model; raises StageError for a model type that is not in the table."""
    names = {module: name for name, module in model.named_modules()}
    return tuple(_stack(model, layout, names) for layout in _layouts(model.config))


def dimensions(config: PreTrainedConfig) -> tuple[Dimensions, ...]:
    """The sizes of every stack by its config alone; raises StageError for a model type that is not in the table."""
    return tuple(_dimensions(config, layout) for layout in _layouts(config))


def _layouts(config: PreTrainedConfig) -> tuple[_Layout, ...]:
    found = LAYOUTS.get(config.model_type)
    if found is None:
        known = ", ".join(sorted(LAYOUTS))
        raise StageError(f"the structure of a '{config.model_type}' model is not known here; known: {known}")
    return found


def _dimensions(config: PreTrainedConfig, layout: _Layout) -> Dimensions:
    heads = getattr(config, layout.heads)
    told = getattr(config, layout.head_dim, None) if layout.head_dim else None
    return Dimensions(
        layout.role,
        getattr(config, layout.count),
        heads,
        getattr(config, "num_key_value_heads", None) or heads,
        told or config.hidden_size // heads,
        getattr(config, layout.channels),
        layout.count,
        layout.heads,
        layout.channels,
        layout.head_dim is not None,
    )


def blocks(model: PreTrainedModel) -> list[Block]:
    """The blocks of every stack, in order."""
    return [block for stack in stacks(model) for block in stack.blocks]


def _stack(model: PreTrainedModel, layout: _Layout, names: Mapping[nn.Module, str]) -> Stack:
    layers: Any = model.base_model.get_submodule(layout.layers)
    return Stack(layout.role, layers, layout.count, tuple(_block(model.config, layout, layer, names[layer]) for layer in layers))


def _block(config: PreTrainedConfig, layout: _Layout, module: nn.Module, name: str) -> Block:
    attentions = tuple(_attention(config, layout, module, path, parts, name) for path, parts in layout.attentions.items())
    return Block(name, module, attentions, _feed_forward(config, layout, module, name))


def _feed_forward(config: PreTrainedConfig, layout: _Layout, block: nn.Module, name: str) -> FeedForward:
    inputs = tuple(found for path in layout.inputs if (found := _optional(block, path)) is not None)
    output: Any = block.get_submodule(layout.output)
    proportional = inputs[-1] if len(inputs) > 1 or getattr(config, layout.activation) == "relu" else None
    return FeedForward(_joined(name, layout.output.rpartition(".")[0]), inputs, output, proportional, _norm(layout, block, MLP))


def _norm(layout: _Layout, block: nn.Module, sublayer: str) -> nn.Module | None:
    return block.get_submodule(layout.norms[sublayer]) if sublayer in layout.norms else None


def _attention(
    config: PreTrainedConfig, layout: _Layout, block: nn.Module, path: str, parts: tuple[str, str, str, str], name: str
) -> Attention:
    module = block.get_submodule(path)
    q, k, v, o = (cast("nn.Linear", module.get_submodule(part)) for part in parts)
    told = getattr(config, layout.head_dim, None) if layout.head_dim else None
    head_dim = told or q.out_features // getattr(config, layout.heads)
    heads, kv_heads = q.out_features // head_dim, k.out_features // head_dim
    return Attention(f"{name}.{path}", q, k, v, o, heads, kv_heads, head_dim, module, _norm(layout, block, path))


def _joined(name: str, path: str) -> str:
    return f"{name}.{path}" if path else name


def _optional(module: nn.Module, path: str) -> Any:
    """The submodule at `path`; None where there is none, as in an MLP without a gate."""
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None
