"""The head that a checkpoint really has: what its files hold decides, and config.json is told.

A config names the class that the weights were trained with, the file may hold the base model alone; and sentence-transformers
says in files of its own (modules.json and a folder for each module) what is done with the base model's output.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from featherweight.checkpoint import sentence_files
from featherweight.checkpoint.files import Listing
from featherweight.errors import CheckpointError
from featherweight.model.architecture import EMBEDDING, encoder_classes, family_of, head_refusal, task_of
from featherweight.model.heads import SentenceEmbedding

# What transformers calls the parts of the heads that fill masks.
_MASKED_HEAD = re.compile(
    r"(^|\.)(cls\.predictions|lm_head|lm_predictions|mlm|vocab_\w+|generator_(predictions|lm_head)|pred_layer)\."
    r"|^(module\.)?(predictions|head|decoder(?!\.layers))\."
)
DEFAULT = "no modules.json says how embeddings are made: the mean of all tokens, as sentence-transformers does then"


def head_changes(listing: Listing, config: Any, names: Iterable[str]) -> tuple[dict[str, Any], str | None]:
    """What config.json has to say otherwise of an encoder's head, and a note; nothing where it is right already.

    names: of the stored tensors. Raises CheckpointError for what sentence-transformers' files ask for and is not known here.
    """
    kind, (base, masked) = sentence_files.made(listing), encoder_classes(config)
    if kind == sentence_files.SCORES:
        return _scores(listing, config), None
    told = kind is not None
    if not told and (head_refusal(config) or task_of(config) not in ("fill-mask", "feature-extraction")):
        return {}, None
    if not told and masked and any(_MASKED_HEAD.search(name) for name in names):
        return ({"architectures": [masked]} if task_of(config) == "feature-extraction" else {}), None
    if base is None or getattr(config, EMBEDDING, None) or not _embeds(listing, config, told):
        return {}, None
    longest = sentence_files.longest(listing, config)
    embedding = sentence_files.embedding(listing, config) if told else SentenceEmbedding(max_tokens=longest)
    return {"architectures": [base], **embedding.settings()}, None if told else DEFAULT


def _scores(listing: Listing, config: Any) -> dict[str, Any]:
    """What the config of a cross-encoder lacks; of another model it is its own head that is refused, or taken."""
    if head_refusal(config) or task_of(config) != "text-classification":
        return {}
    told = sentence_files.activation(listing)
    return {} if getattr(config, "sentence_transformers", None) else told


def _embeds(listing: Listing, config: Any, told: bool) -> bool:
    """Whether vectors are made of what the model reads: an encoder, or a decoder of which sentence-transformers' files tell so."""
    family = family_of(config)
    if told and family == "seq2seq" and not head_refusal(config):
        raise CheckpointError(
            f"{listing.where}: sentence-transformers makes vectors with the encoder of this {config.model_type} alone, which is "
            f"not done here; take {sentence_files.MODULES} out of it to write texts with the whole model"
        )
    return family == "encoder" or (told and family == "causal" and not head_refusal(config))
