"""A served variant: a folder that an engine can load, described by `serving.json` at its root."""

from __future__ import annotations

import filecmp
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from featherweight.errors import IntegrityError, StageError, one_line
from featherweight.system.device import CPU, CUDA, Device

FILE = "serving.json"
SERVED_TOKENS = 512
"""The longest sequence that a served folder is verified for and offered, where nothing else is asked for."""


@dataclass(frozen=True)
class Serving:
    """Which engine serves the folder, and how.

    engine: a name of featherweight.runtimes.catalog.RUNTIMES.
    weights: sub-folder with the engine's own files ('.' for the root). The tokenizer's files lie at the root.
    options: what the engine must be told at load time, such as {"compute_type": "int8"}; the `device` where that is not the CPU.
    grid: name of the grid that the weights lie on, None for float.
    max_tokens: the longest sequence (prompt and new tokens, or scored window) that it was compared with PyTorch to, and is
    offered for; None for what was written before that was recorded. context: the longest that the model was made for; None where it
    names none.
    """

    engine: str
    weights: str = "."
    options: dict[str, str] = field(default_factory=dict)
    grid: str | None = None
    max_tokens: int | None = None
    context: int | None = None

    @property
    def length_note(self) -> str | None:
        """What the report says of one that is offered for less than its model's context; None where it is for all of it."""
        if self.max_tokens is None or (self.context is not None and self.max_tokens >= self.context):
            return None
        whole = f" of a context of {self.context}" if self.context is not None else ""
        return f"verified and served up to {self.max_tokens} tokens{whole}; workload.max_tokens raises it"

    @property
    def device(self) -> Device:
        """Where it was compared with PyTorch, and is served."""
        return CUDA if self.options.get("device") == CUDA else CPU

    def on(self, device: Device) -> Serving:
        """The same, served from `device`."""
        others = {name: value for name, value in self.options.items() if name != "device"}
        return replace(self, options=others | ({"device": device} if device != CPU else {}))

    def write(self, folder: Path) -> None:
        """Write `serving.json` into `folder`."""
        (folder / FILE).write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, folder: Path) -> Serving:
        """Read `folder/serving.json`; raises IntegrityError where there is none."""
        path = folder / FILE
        if not path.is_file():
            raise IntegrityError(f"{folder} is not a served variant: it has no {FILE}")
        return cls.of(path.read_text())

    @classmethod
    def of(cls, text: str) -> Serving:
        """Read the file's text; raises IntegrityError where it is another's."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError, RecursionError) as error:
            raise IntegrityError(f"{FILE} does not say how a variant is served: {one_line(error, 200)}") from error


def verified_tokens(served: Path) -> int:
    """The longest sequence that a served folder is offered for."""
    return Serving.read(served).max_tokens or SERVED_TOKENS


def require_verified(serving: Serving, max_tokens: int) -> None:
    """Raise StageError where sequences of `max_tokens` are longer than what was verified."""
    if serving.max_tokens is not None and max_tokens > serving.max_tokens:
        raise StageError(
            f"{max_tokens} tokens are asked of {serving.engine}, and this model was verified up to {serving.max_tokens} only; "
            f"ask for less, or optimize it anew with workload.max_tokens {max_tokens}"
        )


def same_files(one: Path, other: Path) -> bool:
    """Whether two folders hold the same bytes."""
    if one.resolve() == other.resolve():
        return True
    here, there = _files(one), _files(other)
    if here.keys() != there.keys() or any(here[name].stat().st_size != there[name].stat().st_size for name in here):
        return False
    return all(here[name].samefile(there[name]) or filecmp.cmp(here[name], there[name], shallow=False) for name in here)


def _files(folder: Path) -> dict[Path, Path]:
    return {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}


def served_bytes(folder: Path) -> int:
    """Bytes of everything that is served."""
    return sum(path.stat().st_size for path in _files(folder).values())
