"""Reading on: what a decoder keeps of the tokens that it has read, so that the next ones are all that it is given."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from featherweight.model.architecture import auto_names, family_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

CACHES = ("past_key_values", "cache_params", "state")
"""The names by which decoders take it: keys and values, or the states of scans (Mamba, xLSTM) and of recurrent layers (RWKV).
Under a name that is not its own a model ignores it without a word."""

WITHOUT_KEYS_AND_VALUES = ("falcon_mamba", "mamba", "mamba2", "openai-gpt", "rwkv", "xlm", "xlnet", "xlstm")
"""Model types of decoders that keep something else, or nothing."""
ATTENDING = ("full_attention", "sliding_attention", "chunked_attention")
"""The kinds of layers, by transformers' names, that keep keys and values of every token and nothing else."""
OWN_ATTENTION = ("bloom", "codegen", "falcon", "gpt_neo", "gpt_neox_japanese", "gptj", "mpt", "trocr", "xglm")
"""Model types of decoders whose attention is written out in transformers' module, so that no other takes its place."""
NOT_LEFT_TO_RIGHT = {
    "cpmant": "reads the texts that follow",
    "moshi": "reads the texts that follow",
    "xlnet": "reads the texts that follow",
    "recurrent_gemma": "keeps what it has read in itself, and hands none of it over",
    "doge": "writes other texts with its cache than without",
    "rwkv": "takes one text at a time, and computes something else for several",
}
"""What decoders do, in transformers 5.17's own code, that leaves nothing to hold an engine to."""
NOT_TAKEN = {
    "perceiver": "answers at as many places as it was made for, however short a text is",
    "prophetnet": "writes no text: it refuses the positions of its own cache",
}
"""What encoders and encoder-decoders do there that leaves nothing either."""


def decoder_refusal(config: PreTrainedConfig) -> str | None:
    """Why a model that is to write texts cannot be taken: it does not read from left to right, or not in one way only."""
    kind = config.model_type
    if kind in NOT_TAKEN:
        return f"transformers' {kind} model {NOT_TAKEN[kind]}; take another"
    if family_of(config) != "causal":
        return None
    if refusal := _encoder_refusal(config):
        return refusal
    return f"transformers' {kind} model {NOT_LEFT_TO_RIGHT[kind]}; take another" if kind in NOT_LEFT_TO_RIGHT else None


def _encoder_refusal(config: PreTrainedConfig) -> str | None:
    """That it is one of those that are encoders unless they are told to be decoders."""
    auto = auto_names()
    encoders = {*auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation"} - set(auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
    if getattr(config, "is_decoder", None) is not False or config.model_type not in encoders:
        return None
    way = "set it to true if the weights were trained so, or take task: fill-mask"
    return f"as config.json describes it (is_decoder: false) a {config.model_type} model reads the texts that follow; {way}"


def language_refusal(config: PreTrainedConfig) -> str | None:
    """Why a model of one adapter for each language (X-MOD) cannot be taken: nothing says which of them reads the texts."""
    if config.model_type != "xmod" or config.default_language is not None:
        return None
    return f"config.json names no default_language, without which an xmod model reads nothing; it has {', '.join(config.languages)}"


def random_refusal(config: PreTrainedConfig) -> str | None:
    """Why a model cannot be taken whose attention is drawn anew each time that it reads a text (Reformer's and YOSO's hashes)."""
    told = config.to_dict()
    if config.model_type == "reformer" and "lsh" in (told.get("attn_layers") or ()) and told.get("hash_seed") is None:
        return (
            "a reformer model hashes anew each time that it reads, so that it never answers alike; say a hash_seed in config.json"
        )
    if config.model_type == "yoso" and told.get("use_expectation") is False:
        return "a yoso model hashes anew each time that it reads, so that it never answers alike; say use_expectation: true"
    return None


WINDOWS = {
    "sliding_attention": ("sliding_window", "use_sliding_window: false makes it nothing"),
    "chunked_attention": ("attention_chunk_size", "it is null or left out"),
}
"""By kind of layer: how far back it sees, and why a configuration may not say it."""


def windows_refusal(config: PreTrainedConfig) -> str | None:
    """Why a model cannot be taken of which some layers see back as far as nothing says: transformers fails at its first text."""
    config = config.get_text_config()
    for kind, (key, why) in WINDOWS.items():
        if kind in (getattr(config, "layer_types", None) or ()) and getattr(config, key, 0) is None:
            return f"config.json has layers of {kind} and no {key} ({why}); take layer_types out of it, or say {key}"
    return None


def other_layers(config: PreTrainedConfig) -> list[str]:
    """The kinds of layers of a decoder that keep something besides keys and values, as scans and convolutions do, or nothing."""
    return sorted(set(getattr(config.get_text_config(), "layer_types", None) or ()) - set(ATTENDING))


def cache_name(model: Any) -> str | None:
    """By which name `model` takes what it has read; None of those that keep nothing (GPT, XLM)."""
    known = inspect.signature(model.forward).parameters
    return next((name for name in CACHES if name in known), None)


class Reading:
    """Texts of one length that are read step by step. A model that keeps nothing is given them whole each time.

    Who takes positions is told them, as transformers' `generate` does: some (Bamba) count anew from zero at each step.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.name = model, cache_name(model)
        self.placed = "position_ids" in inspect.signature(model.forward).parameters
        self.kept: Any = None  # each model makes the one that it understands
        self.read = 0

    def next(self, ids: Tensor) -> Tensor:
        """Read on by `ids` [batch, tokens]; returns the logits of what follows, [batch, vocabulary]."""
        if self.name is None:
            return self._whole(ids)
        output = self.model(ids, **{self.name: self.kept}, **self._positions(ids), use_cache=True, logits_to_keep=1)
        self.kept = output[self.name]
        last: Tensor = output.logits[:, -1]
        return last

    def _positions(self, ids: Tensor) -> dict[str, Tensor]:
        import torch

        first, self.read = self.read, self.read + ids.shape[1]
        return {"position_ids": torch.arange(first, self.read, device=ids.device).unsqueeze(0)} if self.placed else {}

    def _whole(self, ids: Tensor) -> Tensor:
        import torch

        self.kept = ids if self.kept is None else torch.cat([self.kept, ids], dim=1)
        last: Tensor = self.model(self.kept).logits[:, -1]
        return last
