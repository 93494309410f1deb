"""What a recipe says of the engines that serve: which one, and the keys that it reads, which stand in its own spec."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, field_validator

from featherweight.errors import RecipeError, nearest
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.runtimes.speculation import Speculation
from featherweight.spec import NamedSpec, SequenceLength
from featherweight.store.served_folder import SERVED_TOKENS
from featherweight.system.device import Device, Wanted

Stage = Literal["compile", "export"]
ComputeType = Annotated[
    Literal[
        "float32",
        "bfloat16",
        "float16",
        "int8",
        "int8_float32",
        "int8_float16",
        "int8_bfloat16",
        "w8a16",
        "w4a16",
        "fp8",
        "nf4",
        "llm.int8",
    ],
    BeforeValidator(lambda value: "int8" if value == "w8a8" else value),
]
"""Which numbers weights are stored in and computed with, in the words that engines share; w8a8 is another name of int8."""
FLOATS: tuple[ComputeType, ...] = ("float32", "bfloat16", "float16")
SIXTEEN_BITS = FLOATS[1:]


class ServingSpec(NamedSpec):
    """An alternative of the last stage; its engine's own spec has the keys that this engine reads.

    max_tokens: the longest sequence that it is verified for and offered, within the model's context; the plan takes the workload's.
    device: where it is served, by default where the recipe says for all. speculation: draft the next tokens and check them in one
    pass; the text is that of the same without it.
    """

    named_by = "engine"
    quiet = frozenset({"device", "speculation"})
    stage: ClassVar[Stage]

    engine: str
    max_tokens: SequenceLength = SERVED_TOKENS
    device: Wanted = "auto"
    speculation: Speculation | None = None

    @classmethod
    def kind(cls, name: str | None) -> type[Self] | None:
        if name is None or name not in RUNTIMES:
            return None
        spec: Any = RUNTIMES[name].spec
        return spec if spec.stage == cls.stage else None

    @classmethod
    def kinds(cls) -> tuple[type[Self], ...]:
        return tuple(dict.fromkeys(kind for name in RUNTIMES if (kind := cls.kind(name))))

    @property
    def changes_texts_alone(self) -> bool:
        """Whether it writes other texts than its scores tell of, so that its loss shows in changed answers alone."""
        return False

    def served_on(self, where: Device) -> Device:
        """The device that it is served from, where a recipe says `where` for all."""
        return where if self.device == "auto" else self.device

    @property
    def without_speculation(self) -> Self:
        """The same, token by token."""
        return self.model_copy(update={"speculation": None})

    @property
    def parts(self) -> tuple[str, ...]:
        return (RUNTIMES.reference(self.engine),)

    @field_validator("engine")
    @classmethod
    def _known(cls, name: str) -> str:
        if cls.kind(name) is not None:
            return name
        try:
            other = RUNTIMES[name].spec.stage
        except RecipeError as error:
            raise ValueError(f"unknown engine '{name}'; {nearest(name, list(cls._names()))}") from error
        raise ValueError(f"{name} is made by {other}, not by {cls.stage}; move it there, or take {', '.join(cls._names())}")

    @classmethod
    def _names(cls) -> Iterator[str]:
        return (name for name in RUNTIMES if cls.kind(name))


class CompileSpec(ServingSpec):
    """An engine that serves a graph made of the checkpoint."""

    stage = "compile"


class ExportSpec(ServingSpec):
    """An engine that serves the checkpoint's modules or its weights in another layout.

    kv_cache: what it keeps keys and values in, null for its own float.
    """

    stage = "export"

    kv_cache: Literal["fp8", "q8_0"] | None = None
