"""The head that a checkpoint really has: what its files hold decides, and config.json is told.

A config names the class that the weights were trained with, the file may hold the base model alone; and sentence-transformers
says in files of its own (modules.json and a folder for each module) what is done with the base model's output.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from featherweight.checkpoint.files import TOKENIZER_CONFIG, Listing, read_json, read_list
from featherweight.errors import CheckpointError
from featherweight.model.architecture import EMBEDDING, encoder_classes, family_of, head_refusal, task_of
from featherweight.model.heads import POOLINGS, SentenceEmbedding
from featherweight.model.positions import context_tokens

MODULES, SENTENCE, PROMPTS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
# What transformers calls the parts of the heads that fill masks.
_MASKED_HEAD = re.compile(
    r"(^|\.)(cls\.predictions|lm_head|lm_predictions|mlm|vocab_\w+|generator_(predictions|lm_head)|pred_layer)\."
    r"|^(module\.)?(predictions|head|decoder)\."
)
_FLAG = "pooling_mode_"
_FLAGS = {"cls_token": "cls", "mean_tokens": "mean", "max_tokens": "max", "weightedmean_tokens": "weightedmean"}
DEFAULT = "no modules.json says how embeddings are made: the mean of all tokens, as sentence-transformers does then"


def head_changes(listing: Listing, config: Any, names: Iterable[str]) -> tuple[dict[str, Any], str | None]:
    """What config.json has to say otherwise of an encoder's head, and a note; nothing where it is right already.

    names: of the stored tensors. Raises CheckpointError for a module of sentence-transformers that is not known here.
    """
    told, (base, masked) = MODULES in listing.sizes, encoder_classes(config)
    if not told and (head_refusal(config) or task_of(config) not in ("fill-mask", "feature-extraction")):
        return {}, None
    if not told and masked and any(_MASKED_HEAD.search(name) for name in names):
        return ({"architectures": [masked]} if task_of(config) == "feature-extraction" else {}), None
    if base is None or not _embeds(config, told) or getattr(config, EMBEDDING, None):
        return {}, None
    embedding = _embedding(listing, config) if told else SentenceEmbedding(max_tokens=_longest(listing, config))
    return {"architectures": [base], **embedding.settings()}, None if told else DEFAULT


def _embeds(config: Any, told: bool) -> bool:
    """Whether vectors are made of what the model reads: an encoder, or a decoder of which sentence-transformers' files tell so."""
    family = family_of(config)
    return family == "encoder" or (told and family == "causal" and not head_refusal(config))


def _embedding(listing: Listing, config: Any) -> SentenceEmbedding:
    """What the modules behind the base model do."""
    pooling: tuple[str, ...] = ()
    normalize = False
    for module in read_list(listing, MODULES)[1:]:
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind == "Pooling":
            pooling = _poolings(read_json(listing, f"{module['path']}/config.json"), listing.where)
        elif kind == "Normalize":
            normalize = True
        else:
            raise CheckpointError(
                f"{listing.where}: its embeddings go through sentence-transformers' {kind or 'unnamed'} module, which is not known "
                "here; known: Pooling, Normalize"
            )
    said = read_json(listing, SENTENCE) if SENTENCE in listing.sizes else {}
    prompts = read_json(listing, PROMPTS) if PROMPTS in listing.sizes else {}
    prompt = (prompts.get("prompts") or {}).get(prompts.get("default_prompt_name"), "")
    longest = said.get("max_seq_length") or _longest(listing, config)
    return SentenceEmbedding(pooling or ("mean",), normalize, longest, bool(said.get("do_lower_case")), prompt or "")


def _poolings(said: dict[str, Any], where: str) -> tuple[str, ...]:
    """The modes of a Pooling module: named, as releases from 5.2 on write them, or flags."""
    if said.get("include_prompt") is False:
        raise CheckpointError(f"{where}: its pooling leaves the prompt out (include_prompt false), which is not done here")
    named = said.get("pooling_mode")
    modes = [named] if isinstance(named, str) else list(named or ())
    flags = [key.removeprefix(_FLAG) for key, on in said.items() if key.startswith(_FLAG) and on is True]
    modes += [_FLAGS.get(flag, flag) for flag in flags]
    unknown = [mode for mode in modes if mode not in POOLINGS]
    if unknown or not modes:
        raise CheckpointError(f"{where}: pooling '{', '.join(unknown)}' is not known here; known: {', '.join(POOLINGS)}")
    return tuple(modes)


def _longest(listing: Listing, config: Any) -> int:
    """The longest text: what both the positions and the tokenizer allow."""
    told = read_json(listing, TOKENIZER_CONFIG) if TOKENIZER_CONFIG in listing.sizes else {}
    return int(min(context_tokens(config), told.get("model_max_length") or 2**31))
