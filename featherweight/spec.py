"""Specs: what a recipe says of one subject, frozen and strict, and the words that several of them share."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from featherweight.errors import RecipeError
from featherweight.grid import grid_named

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]


HISTORY_SUFFIX = ".history"
"""Behind a model's name: that of the registered model which holds its history."""


def registrable(name: str) -> str:
    """A name that MLflow registers, and that a reference such as NAME/3 or NAME@champion can be told from; else ValueError."""
    if name.endswith(HISTORY_SUFFIX):
        raise ValueError(f"'{name}' cannot name a registered model: '{HISTORY_SUFFIX}' ends the names of those that hold histories")
    if not re.fullmatch(r"\w[\w .-]{0,199}", name) or name != name.strip():
        raise ValueError(
            f"'{name}' cannot name a registered model; take letters, digits, '_', and behind the first also '-', '.' and spaces, "
            "at most 200 of them"
        )
    return name


ModelName = Annotated[str, AfterValidator(registrable)]


# Far above anything that a machine can do, far below what overflows on the way there.
Positive = Annotated[int, Field(gt=0, le=10**15)]


# The first token of a sequence is only read: one alone leaves nothing to predict.
SequenceLength = Annotated[int, Field(ge=2, le=10**9)]


Split = Literal["train", "calibration", "evaluation"]


Share = Annotated[float, Field(gt=0, lt=1)]


Head = Literal["feature-extraction", "text-classification", "token-classification"]
Task = Literal["text-generation", "text2text-generation", "fill-mask", Head]


HEADED: tuple[Task, ...] = ("feature-extraction", "text-classification", "token-classification")
"""Tasks of encoders that answer a text at once: by a vector, by labels, by a label for each token."""


def _known_grid(name: str) -> str:
    try:
        return grid_named(name).name
    except RecipeError as error:
        raise ValueError(str(error)) from error


GridName = Annotated[str, AfterValidator(_known_grid)]


ATTENTION = 1 / 3
"""The share of a block's weights that is attention's."""


@dataclass(frozen=True)
class ModelSize:
    """How large a model is: its weights, the matrices among them, and the columns of those in the blocks, all together.

    packed: the weights have to be unpacked when they are loaded. table: the weights of its embedding; widest: the columns of the
    widest matrix in a block; layers: the blocks; outside: the weights outside of the blocks' matrices, an untied head's too; each 0
    where it is not known. in_files: its weights can stay in the checkpoint's
    files, as those of dense decoders can (checkpoint/streamed.py).
    """

    parameters: int
    matrices: int = 0
    columns: int = 0
    packed: bool = False
    table: int = 0
    widest: int = 0
    layers: int = 0
    in_files: bool = True
    outside: int = 0

    @property
    def in_blocks(self) -> int:
        """The weights of the matrices in its blocks."""
        return self.parameters - (self.outside or self.table)

    def kept(self, *, depth: float = 1.0, hidden: float = 1.0, channels: float = 1.0, heads: float = 1.0) -> ModelSize:
        """About what is left of it where so large a share of its layers, hidden size, MLP channels and heads stays.

        By a block of usual proportions: a third of its weights is attention's, which the heads share out.
        """
        outside = round((self.outside or self.table) * hidden)
        body = self.in_blocks * depth * hidden * ((1 - ATTENTION) * channels + ATTENTION * heads)
        inner = self.widest * self.layers
        return replace(
            self,
            parameters=outside + round(body),
            matrices=max(1, round(self.matrices * depth)) if self.matrices else 0,
            columns=round(depth * (inner * channels + (self.columns - inner) * hidden)),
            table=round(self.table * hidden),
            widest=round(self.widest * channels),
            layers=round(self.layers * depth),
            outside=round(self.outside * hidden),
        )


UNITS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def seconds_of(text: str, named: str = "--budget") -> float:
    """'10m', '90s', '1.5 h', '30d' or a number of seconds. Raises RecipeError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip())
    if found is None or found[2] not in UNITS:
        raise RecipeError(f"{named} {text}: give a time, such as 90s, 10m, 1h or 30d")
    return float(found[1]) * UNITS[found[2]]


def _seconds(value: Any) -> Any:
    try:
        return seconds_of(value, "the time") if isinstance(value, str) else value
    except RecipeError as error:
        raise ValueError(str(error)) from error


LONGEST_S = 10**9

Duration = Annotated[float, BeforeValidator(_seconds), Field(gt=0, le=LONGEST_S)]
"""Seconds, or a time in words."""


class Spec(BaseModel):
    """Frozen, and strict: a key that is misspelt, or that the rest leaves without a meaning, is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    quiet: ClassVar[frozenset[str]] = frozenset()
    """Keys that a dump leaves out at their default: they were added later, and no digest of before is to change."""

    @property
    def unread(self) -> dict[str, str]:
        """Keys without a meaning here, such as the criterion of a method that asks none, and what makes them so."""
        return {}

    @property
    def parts(self) -> tuple[str, ...]:
        """The methods and engines that it names, as 'module:attribute': what they are made of shapes the result."""
        return ()

    def operations(self, size: ModelSize) -> float:
        """About how many floating-point operations its stage takes for a model of this size, loading and saving aside."""
        return 0.0

    def left(self, size: ModelSize) -> ModelSize:
        """About how large the model is that its stage makes of one of this size."""
        return size

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        for key, reason in self.unread.items():
            if key in self.model_fields_set:
                raise ValueError(f"{key} plays no role {reason}; leave it out")
        return self

    @model_serializer(mode="wrap")
    def _what_is_read(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """So that a dump is valid in its turn, and that no cache key holds what changes nothing."""
        silent = {key for key in self.quiet if getattr(self, key) == type(self).model_fields[key].default}
        return {key: value for key, value in dump(self).items() if key not in self.unread and key not in silent}


class NamedSpec(Spec):
    """A spec whose keys depend on a name in it, an engine's or a method's: validating it gives the class that reads that name's.

    A field of this type is `SerializeAsAny`, so that a dump has the keys of that class.
    """

    named_by: ClassVar[str]
    """The key that holds the name."""

    @classmethod
    def kind(cls, name: str | None) -> type[Self] | None:
        """The class that reads the keys of `name` (its default, where that is None); None where there is none of the name."""
        raise NotImplementedError

    @classmethod
    def kinds(cls) -> Collection[type[Self]]:
        """All of these classes: what one of them reads and another does not is told by its name."""
        raise NotImplementedError

    @classmethod
    def of(cls, **keys: Any) -> Self:
        """The spec of these keys, in the class that reads them."""
        return cls.model_validate(keys)

    @model_validator(mode="wrap")
    @classmethod
    def _as_its_kind(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        name = value.get(cls.named_by) if isinstance(value, dict) else value
        if not isinstance(value, dict) or not isinstance(name, str | None):
            return handler(value)
        kind = cls.kind(name) or cls
        if issubclass(kind, cls) and kind is not cls:
            return kind.model_validate(value)
        if kind is cls:
            cls._refuse_unread(value)
        return handler(value)

    @classmethod
    def _refuse_unread(cls, value: dict[str, Any]) -> None:
        """Raise ValueError for a key that plays no role with this name, but does with another; unknown names are told elsewhere."""
        named, known = value.get(cls.named_by), not cls.model_fields[cls.named_by].is_required()
        foreign = value.keys() - cls.model_fields.keys() if cls.kind(named) or (named is None and known) else ()
        for key in sorted(foreign) if foreign else ():
            if any(key in kind.model_fields for kind in cls.kinds()):
                name = named or cls.model_fields[cls.named_by].default
                raise ValueError(f"{key} plays no role with {cls.named_by} {name}; leave it out")


Layers = Positive | tuple[Annotated[int, Field(ge=0)], ...]


def share_of_layers(layers: int | tuple[int, ...], size: ModelSize) -> float:
    """What share of a model's layers so many of them are, or these; all where their number is not known."""
    kept = layers if isinstance(layers, int) else len(layers)
    return min(1.0, kept / size.layers) if size.layers else 1.0


class ByStack(Spec):
    """Something for each stack of an encoder-decoder; null where it is not said."""

    encoder: Any = None
    decoder: Any = None

    def require_known(self, key: str, stacks: Collection[str]) -> None:
        """Raise RecipeError, which names the recipe's `key`, for a stack that the model does not have."""
        for role in self.model_dump(exclude_none=True).keys() - set(stacks):
            raise RecipeError(f"{key}.{role}: the model has no {role}; leave it out")
