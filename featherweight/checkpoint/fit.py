"""Whether the tensors of a file are those that config.json asks for, told by headers alone for decoders built as a Llama is.

Of others dry_run.py tells, which builds the model: this costs no import of torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from featherweight.checkpoint.files import CONFIG
from featherweight.errors import CheckpointError
from featherweight.model.architecture import GATED_DECODERS

Shape = tuple[int, ...]
IN_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.((?:self_attn|mlp)\.\w+\.(?:weight|bias)|\w+_layernorm\.weight)$")
BESIDE = re.compile(r"(?:^|\.)rotary_emb\.inv_freq$")
EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|lm_head)\.weight$")
ROWS, NORM = "embed_tokens.weight", "norm.weight"
PREFIX = re.compile(r"^(?:module\.|base_model\.model\.)?(?:model\.)?")
"""What may stand before the names of a Llama's tensors, those of a wrapped one and of its base model too."""
USUAL = re.compile(r"(?:layers|embed_tokens|norm|lm_head|rotary_emb)\.")
"""What they begin with behind it."""
WRAPPED = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
BIASES = {"self_attn": "attention_bias", "mlp": "mlp_bias"}
SIZES = ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


def misfit(held: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> tuple[str, str, str] | None:
    """The first tensor that is not of one shape in both: its name, the shape that is held, and the one that is wanted ('none' where
    there is no such tensor).
    """
    name = next((name for name in sorted(held.keys() | wanted) if held.get(name) != wanted.get(name)), None)
    if name is None:
        return None
    found, asked = (str(list(shapes[name])) if name in shapes else "none" for shapes in (held, wanted))
    return name, found, asked


def require_fit(where: str, config: Any, shapes: Mapping[str, Shape]) -> bool:
    """Raise CheckpointError for matrices of other shapes than `config` asks for, and for layers that are missing, or too many.

    Returns whether it could tell: there is nothing under another name, and nothing under two.
    """
    wanted, count = _asked(config), getattr(config, "num_hidden_layers", 0)
    if not wanted:
        return False
    pad = getattr(config, "pad_token_id", None)
    if isinstance(pad, int) and not -config.vocab_size <= pad < config.vocab_size:
        raise CheckpointError(f"{where}/{CONFIG}: pad_token_id is {pad}, and {beyond_vocabulary(config.vocab_size)}")
    found: dict[int, set[str]] = {}
    plain: set[str] = set()
    unknown = False
    for stored, shape in shapes.items():
        name = PREFIX.sub("", WRAPPED.sub("", stored))
        plain.add(name)
        place = IN_LAYER.search(name)
        asked = wanted.get(place[2] if place else ROWS if EMBEDDING.search(name) else NORM if name == NORM else "")
        if asked is not None and shape != asked:
            raise CheckpointError(
                f"{where}: tensor {stored} has shape {list(shape)}, but {CONFIG} asks for {list(asked)}; "
                "weights and config.json do not belong together"
            )
        if place and asked is not None:
            found.setdefault(int(place[1]), set()).add(place[2])
        unknown |= not USUAL.match(name) or (asked is None and not BESIDE.search(name))
    if found and not unknown:
        _require_layers(where, found, count, {name for name in wanted if name.endswith("bias")})
    there = set[str]().union(plain, *found.values())
    whole = all(name in there for name in wanted if name.endswith("weight"))  # of another kind, or nowhere at all: dry_run tells
    return bool(found) and not unknown and len(plain) == len(shapes) and whole


def beyond_vocabulary(size: int) -> str:
    """What is wrong with a padding token, which transformers stops at in words of torch's."""
    return f"the vocabulary has {size} tokens; say one of them there, or null"


def beyond_embedding(most: int, rows: int) -> str:
    """What is wrong with a tokenizer whose last token is `most`, and the way out of it."""
    return (
        f"the tokenizer has ids up to {most}, but the embedding has only {rows} rows; resize it (resize_token_embeddings) and save "
        "the model anew, or take the tokens beyond it out of the tokenizer's files"
    )


def _require_layers(where: str, found: Mapping[int, set[str]], count: int, biases: set[str]) -> None:
    """What is there of one layer is there of all, and the biases of its matrices."""
    wanted = set[str]().union(*found.values())
    wanted |= {name for name in biases if f"{name[:-4]}weight" in wanted}
    beyond = max(found)
    if beyond >= count:
        raise CheckpointError(
            f"{where}: its tensors are of {beyond + 1} layers, but {CONFIG} asks for {count}; "
            "weights and config.json do not belong together"
        )
    for layer in range(count):
        missing = sorted(wanted - found.get(layer, set()))
        if missing:
            more = f" (and {len(missing) - 1} more of this layer)" if len(missing) > 1 else ""
            raise CheckpointError(f"{where}: tensor {missing[0]} of layer {layer} is missing{more}; copy it again")


def _asked(config: Any) -> dict[str, Shape]:
    """The shapes of an embedding and of the matrices of each layer; nothing where they are not those of a Llama."""
    sizes: list[Any] = [getattr(config, name, None) for name in SIZES]
    if config.model_type not in GATED_DECODERS or not all(type(size) is int and size > 0 for size in sizes):
        return {}
    hidden, inner, vocabulary, _, heads, pairs = sizes
    told = getattr(config, "head_dim", None)
    if told is not None and (type(told) is not int or told <= 0):
        return {}
    width = told or hidden // heads
    asked: dict[str, Shape] = {ROWS: (vocabulary, hidden), NORM: (hidden,)}
    asked |= {f"self_attn.{name}_proj.weight": (pairs * width, hidden) for name in ("k", "v")}
    asked |= {"self_attn.q_proj.weight": (heads * width, hidden), "self_attn.o_proj.weight": (hidden, heads * width)}
    asked |= {f"mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")} | {"mlp.down_proj.weight": (hidden, inner)}
    asked |= {f"{name[:-6]}bias": (shape[0],) for name, shape in asked.items() if name.partition(".")[0] in _biased(config, name)}
    if config.model_type == "qwen3":
        asked |= {f"self_attn.{name}_norm.weight": (width,) for name in ("q", "k")}
    return asked | {f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}


def _biased(config: Any, name: str) -> tuple[str, ...]:
    """The parts of a layer whose matrix of that name has a bias."""
    if config.model_type == "qwen2":
        return () if name.endswith("o_proj.weight") else ("self_attn",)
    return tuple(part for part, key in BIASES.items() if getattr(config, key, False))
