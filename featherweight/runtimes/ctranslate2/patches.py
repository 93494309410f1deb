"""What CTranslate2's converter gets wrong, put right around its use. Each was needed with ctranslate2 4.8 and transformers 5.17."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from featherweight.model.positions import AFTER_PADDING
from featherweight.model.surgery import replace_weight
from featherweight.runtimes.ctranslate2 import rotary
from featherweight.text.model_inputs import decoder_start

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def quick_collections() -> Iterator[None]:
    """CTranslate2's loaders run a full garbage collection per layer, which takes seconds: here one of the youngest objects."""
    from ctranslate2.converters import transformers

    loaders: Any = transformers
    loaders.gc = SimpleNamespace(collect=lambda: gc.collect(0))
    try:
        yield
    finally:
        loaders.gc = gc


ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert")
"""Model types of encoders that CTranslate2 converts."""
NORMALIZED_BEFORE = {"bart": False, "mbart": True, "pegasus": True, "marian": False}


def mend_model(model: PreTrainedModel) -> None:
    """Put back what CTranslate2's loaders read of a model and transformers 5 has dropped, overwrites, or counts otherwise."""
    config = model.config
    rotary.hide_scaling(config)
    if config.model_type in NORMALIZED_BEFORE:
        config.normalize_before = NORMALIZED_BEFORE[config.model_type]
        config.normalize_embedding = config.model_type in ("bart", "mbart")
    if config.model_type in ENCODERS:
        config.position_embedding_type = "absolute"
        if config.model_type != "distilbert" and getattr(model, "pooler", None) is None:
            model.pooler = _no_pooler(config.hidden_size)  # the loaders take one; see drop_pooler
        if config.model_type in AFTER_PADDING and config.pad_token_id == 0:
            # Its loaders cut the rows up to the padding's off, but none where that is the first.
            positions: Any = model.get_submodule("embeddings.position_embeddings")
            replace_weight(positions, positions.weight[1:])
        if config.model_type == "xlm-roberta":
            model.__dict__["roberta"] = model  # its loader looks below a head
    if config.model_type in ("t5", "mt5"):
        # The loader takes it for the sign that the decoder's outputs are scaled; transformers calls every T5 tied.
        config.tie_word_embeddings = getattr(config, "scale_decoder_outputs", False)
    if config.model_type == "gpt_neox":
        model.embed_out, config.rotary_pct = model.lm_head, 1.0  # of which `rotary.give` makes what it is
    if config.model_type == "falcon" and config.new_decoder_architecture:
        config.multi_query = False  # of which the new architecture's heads know nothing
        blocks: Any = model.get_submodule("transformer.h")
        for layer in blocks:
            if not hasattr(layer, "ln_attn"):
                layer.ln_attn = layer.ln_mlp = layer.input_layernorm
    if config.model_type == "phi3":
        for layer in model.model.layers:
            layer.self_attn.rotary_emb = SimpleNamespace(long_factor=None, short_factor=None)
    if config.model_type == "m2m_100":
        for positions in (model.model.encoder.embed_positions, model.model.decoder.embed_positions):
            positions.offset = positions.padding_idx + 1  # where its forward begins; the attribute is always 2


def _no_pooler(width: int) -> Any:
    from torch import nn

    pooler = nn.Module()
    pooler.dense = nn.Linear(width, width)
    return pooler


def drop_pooler(spec: Any) -> None:
    """Leave out the pooler of an encoder: no answer is read from it here, and CTranslate2 would round it to int8 with the rest."""
    for name in ("pooler_dense", "pooler_activation"):
        spec.__dict__.pop(name, None)


def give_head_dim(spec: Any, model: PreTrainedModel) -> None:
    """Tell the decoder its head width where it is not hidden_size / heads, as after pruning heads.

    CTranslate2's Llama, Mistral and Qwen2 loaders leave it out, and the model then silently computes something else.
    """
    import numpy

    config = model.config
    head_dim = getattr(config, "head_dim", None)
    if config.is_encoder_decoder or head_dim is None or head_dim * config.num_attention_heads == config.hidden_size:
        return
    for layer in spec.decoder.layer:
        # Specs refuse attributes that their constructor did not make.
        layer.self_attention.__dict__.setdefault("head_dim", numpy.int32(head_dim))


def give_decoder_heads(spec: Any, model: PreTrainedModel) -> None:
    """Tell the decoder behind an encoder how many heads it has: CTranslate2's loaders give it as many as the encoder has."""
    import numpy

    heads = getattr(model.config, "decoder_attention_heads", None)
    if model.config.is_encoder_decoder and heads is not None:
        spec.decoder.num_heads = numpy.dtype("int16").type(heads)


EPSILONS = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps")


def give_epsilon(spec: Any, model: PreTrainedModel) -> None:
    """Tell a decoder what its norms add to a variance, which half of the loaders leave at CTranslate2's usual number."""
    told = [value for name in EPSILONS if (value := getattr(model.config, name, None)) is not None]
    if told and not model.config.is_encoder_decoder:
        spec.config.layer_norm_epsilon = told[0]


def mend_vocabularies(spec: Any, model: PreTrainedModel) -> None:
    """Vocabularies that CTranslate2 loads, with the tokens at their places."""
    if model.config.is_encoder_decoder:
        _mend_both(spec, model)
    else:
        _mend_one(spec)
    _mend_special(spec)


def _mend_one(spec: Any) -> None:
    """One token per row of the embedding, and no null among the special ones: CTranslate2 refuses to load anything else."""
    size = spec.get_vocabulary_size()
    tokens = spec._vocabulary[:size]
    spec._vocabulary = tokens + [f"<extra_id_{index}>" for index in range(size - len(tokens))]


def _mend_both(spec: Any, model: PreTrainedModel) -> None:
    """The same for source and target, and no token twice: tokens are all that comes back. The decoder starts as in PyTorch."""
    sizes = {"source": spec.get_source_vocabulary_size()[0], "target": spec.get_target_vocabulary_size()}
    for side, size in sizes.items():
        seen: dict[str, int] = {}
        for index, token in enumerate(spec._vocabularies[side][0][:size]):
            seen[token if token not in seen else f"<unused_{index}>"] = index
        spec._vocabularies[side] = [[*seen, *(f"<unused_{index}>" for index in range(len(seen), size))]]
    spec.config.decoder_start_token = spec._vocabularies["target"][0][decoder_start(model.config)]


def _mend_special(spec: Any) -> None:
    for name in ("unk_token", "bos_token", "eos_token"):
        if getattr(spec.config, name, None) is None:
            setattr(spec.config, name, "")
