"""What is known of a checkpoint before any weight of it is read: its configuration, generation settings, names and shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any

from featherweight.grid import Grid
from featherweight.model.architecture import class_by_type, encoder_classes, task_of
from featherweight.spec import ModelSize, Task

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_IN_A_BLOCK = re.compile(r"\.\d+\..*\.weight$|^\d+\..*\.weight$")
_SIZES = ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size")
_NO_LINEAR = re.compile(r"relative_attention_bias|(^|[._])(wpe|norm|ln_\w+|rotary_emb)\b")
LONGEST_CONVOLUTION = 8
CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Model types whose layers are transformers' Conv1D, which holds a row of the weight in each column."""
_SENSES = {"vision_config": "images", "audio_config": "sound"}
"""What else than text a model is given, by the part of its configuration that is about it."""


def _of_experts(name: str, shape: tuple[int, ...]) -> bool:
    """Convolutions have three dimensions too, one of them a few steps of time wide."""
    return (len(shape) == 3 and min(shape[1:]) > LONGEST_CONVOLUTION) or (len(shape) == 2 and ".experts." in name)


class Values:
    """Attributes as transformers' configurations have them, without transformers: `described` is what `describe` told of one."""

    def __init__(self, described: Mapping[str, Any]) -> None:
        self._told = described

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_told":
            raise AttributeError(name)
        told = self._told
        try:
            return told["values"][told["names"].get(name, name)]
        except KeyError:
            raise AttributeError(name) from None

    def get_text_config(self) -> Values:
        """The configuration of the part that reads and writes text, as transformers' own method gives it."""
        return Values(self._told["text"]) if self._told.get("text") else self

    def to_dict(self) -> dict[str, Any]:
        """Its values by transformers' names."""
        return dict(self._told["values"])


def describe(config: PreTrainedConfig) -> dict[str, Any]:
    """A configuration in JSON: `values` (properties too), other `names` of them, its `class`, and that of its `text` part."""
    kind = type(config)
    values = config.to_dict()
    for name in (name for name in dir(kind) if isinstance(getattr(kind, name, None), property) and not name.startswith("_")):
        try:
            value = getattr(config, name)
        except Exception:
            continue
        if isinstance(value, str | int | float | list | dict):
            values.setdefault(name, value)
    values["encoder_classes"] = list(encoder_classes(config))
    if (opened_with := class_by_type(config)) is not None:
        values["architectures"] = [opened_with]
    text = config.get_text_config()
    told = {"class": kind.__name__, "values": values, "names": dict(kind.attribute_map)}
    return told | ({"text": describe(text)} if text is not config else {})


@dataclass(frozen=True)
class TokenizerFacts:
    """What a checkpoint's tokenizer does, as opening it tells.

    lead: the ids that it puts before every text, None where it does not tell. chat: why its chat template writes no plain
    conversation, in one line; None where it does, or there is no template.
    """

    lead: tuple[int, ...] | None = None
    chat: str | None = None


@dataclass(frozen=True)
class CheckpointFacts:
    """A checkpoint, as far as it tells of itself without its weights.

    config: transformers' configuration, or `Values` of one. generation: its generation_config.json, likewise; None where unknown.
    shapes: of the stored tensors by name; None where only loading tells. quantized: how its weights are packed ('gptq', 'gguf').
    grids: of the stored matrices whose integers stay as they are. sparse: it has zeros that are to stay.
    tokenizer: the class that its tokenizer_config.json names, None where it names none. opened: what opening it tells, None where
    that is not known.
    sized: whether the sizes in `config` are those of the model; those of one that is still to be pruned are not known.
    """

    config: Any
    generation: Any = None
    shapes: Mapping[str, tuple[int, ...]] | None = None
    size_bytes: int = 0
    quantized: str | None = None
    grids: Mapping[str, Grid] = field(default_factory=dict)
    sparse: bool = False
    sized: bool = True
    tokenizer: str | None = None
    opened: TokenizerFacts | None = None

    @property
    def lead(self) -> tuple[int, ...] | None:
        """The ids that the tokenizer puts before every text, None where they are not known."""
        return self.opened.lead if self.opened else None

    @property
    def task(self) -> Task:
        """What the model is made for."""
        return task_of(self.config)

    @property
    def model_type(self) -> str:
        """As transformers names it."""
        return str(self.config.model_type)

    @property
    def other_senses(self) -> list[str]:
        """What it takes beside text, which nothing here gives it."""
        values = self.config.to_dict()
        return [what for name, what in _SENSES.items() if values.get(name)]

    @property
    def config_class(self) -> str:
        """The class of its configuration, such as 'LlamaConfig'."""
        return str(self.config._told["class"]) if isinstance(self.config, Values) else type(self.config).__name__

    @property
    def parameters(self) -> int:
        """Number of stored weights; 0 where that is not known."""
        return sum(map(prod, self.shapes.values())) if self.shapes else 0

    @property
    def stored_half(self) -> str | None:
        """The float of 16 bits that the weights are stored in; None where they are stored otherwise, or that is not known."""
        told = str(getattr(self.config, "dtype", None)).removeprefix("torch.")
        two_bytes = self.parameters and self.size_bytes < 3 * self.parameters
        return told if two_bytes and self.quantized is None and told in ("float16", "bfloat16") else None

    @property
    def size(self) -> ModelSize:
        """How large the model is; where its headers do not tell, by the arithmetic of a decoder of its configuration's sizes."""
        rows, packed = self.rows_and_columns, self.quantized is not None
        config = self.config.get_text_config()
        hidden, layers, vocabulary, inner = (getattr(config, name, None) or 0 for name in _SIZES)
        table = vocabulary * hidden
        if rows:
            columns, outside = [columns for _, columns in rows.values()], self.parameters - sum(map(prod, rows.values()))
            stays = not packed and not self.sparse and not self.experts and self.task == "text-generation"
            return ModelSize(self.parameters, len(rows) + 1, sum(columns), packed, table, max(columns), layers, stays, outside)
        body = layers * hidden * (4 * hidden + 3 * (inner or 4 * hidden))
        heads = table * (1 if getattr(config, "tie_word_embeddings", True) else 2)
        parameters = body + heads or self.size_bytes // 4
        columns_in_all = layers * (6 * hidden + inner)
        return ModelSize(parameters, 7 * layers + 1, columns_in_all, packed, table, inner or 4 * hidden, layers, outside=heads)

    @property
    def rows_and_columns(self) -> dict[str, tuple[int, int]]:
        """Of the linear layers inside the blocks, by stored name, as matrices that are applied to a column of inputs."""
        found = ((name, shape) for name, shape in (self.shapes or {}).items() if len(shape) == 2 and _IN_A_BLOCK.search(name))
        turned = self.model_type in CONV1D
        return {name: (s[1], s[0]) if turned else (s[0], s[1]) for name, s in found if not _NO_LINEAR.search(name)}

    @property
    def experts(self) -> float:
        """The share of the stored weights that are those of experts: a matrix for each, or one of three dimensions for all."""
        found = (prod(shape) for name, shape in (self.shapes or {}).items() if _of_experts(name, shape))
        return sum(found) / (self.parameters or 1)

    @property
    def kept_grids(self) -> tuple[Grid, Grid | None, Grid | None] | None:
        """The grids that the checkpoint came with: of the body, of embedding and head, of finer matrices; None for floats."""
        body = {grid for name, grid in self.grids.items() if _IN_A_BLOCK.search(name)}
        heads = {grid for name, grid in self.grids.items() if not _IN_A_BLOCK.search(name)}
        if not body:
            return None
        coarse, *finer = sorted(body, key=lambda grid: grid.bits)
        return coarse, min(heads, key=lambda grid: grid.bits) if heads else None, finer[0] if finer else None

    def cut(self) -> CheckpointFacts:
        """What is left to know of it once it has been pruned, or a student made of its layers: all but its sizes."""
        return replace(self, shapes=None, sized=False)
