"""What a GGUF file says of itself, read from its first bytes wherever it lies: settings, tensors, and where those end.

The layout is that of ggml's docs/gguf.md; the `gguf` library reads whole local files only.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from featherweight.checkpoint.files import Listing
from featherweight.errors import CheckpointError

_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value by its type; 8 is a string, 9 an array."""
_STRING, _ARRAY = 8, 9
_MAGIC = b"GGUF"
_FIRST_READ, _MAX_HEADER = 1 << 20, 100_000_000
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
ARCHITECTURE, ALIGNMENT = "general.architecture", "general.alignment"
SHAPES = "featherweight.shapes"
LISTS = TOKENS, SCORES, TYPES, MERGES = tuple(f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type", "merges"))
"""What has an entry for each of a tokenizer's pieces."""


@dataclass(frozen=True)
class GgufTensor:
    """Type by ggml's number, shape, and the place of its bytes in the file."""

    kind: int
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def type(self) -> str:
        """The type's name, such as 'Q4_K'."""
        from gguf import GGMLQuantizationType

        return GGMLQuantizationType(self.kind).name


@dataclass(frozen=True)
class GgufHeader:
    """settings: the bytes of each value, its type before it. tensors: by name."""

    settings: Mapping[str, bytes]
    tensors: Mapping[str, GgufTensor]

    @property
    def end(self) -> int:
        """How many bytes the file has at least."""
        return max((tensor.end for tensor in self.tensors.values()), default=0)

    @property
    def pieces(self) -> int | None:
        """How many pieces its tokenizer has; None where it has no tokenizer."""
        return self.count(TOKENS)

    def count(self, key: str) -> int | None:
        """How many entries a setting has that is an array; None where it is not there, or something else."""
        return int.from_bytes(self.settings[key][8:16], "little") if self._kind(key) == _ARRAY else None

    def value(self, key: str) -> Any:
        """A setting as Python has it: text, number, truth, or a list; None where it is not there."""
        return _Reader(self.settings[key]).value() if key in self.settings else None

    def text(self, key: str) -> str | None:
        """A setting that is text; None where it is not there, or something else."""
        return self.value(key) if self._kind(key) == _STRING else None

    def number(self, key: str) -> float | None:
        """A setting that is a number, or a truth; None where it is not there, or something else."""
        found = None if self._kind(key) == _ARRAY else self.numbers(key)
        return found[0] if found else None

    def numbers(self, key: str) -> list[float] | None:
        """A setting that is an array of numbers, or one number; None where it is not there, or something else."""
        value = self.settings.get(key, b"")
        kind, begin = (value[4:8], 16) if self._kind(key) == _ARRAY else (value[:4], 4)
        layout = _NUMBERS.get(int.from_bytes(kind, "little")) if value else None
        return [float(one) for (one,) in struct.iter_unpack(f"<{layout}", value[begin:])] if layout else None

    def _kind(self, key: str) -> int:
        return int.from_bytes(self.settings.get(key, b"")[:4], "little")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors by name, rows first; of a sketch, those of the file that it is one of."""
        if (told := self.text(SHAPES)) is not None:
            return {name: tuple(shape) for name, shape in json.loads(told).items()}
        return {name: tuple(reversed(tensor.shape)) for name, tensor in self.tensors.items()}

    def sketch(self) -> bytes:
        """A file with all that this header says of the model but for the tokenizer's lists, and one number for each tensor, whose
        shapes are a setting.
        """
        kept = {key: value for key, value in self.settings.items() if key not in LISTS}
        kept[SHAPES] = struct.pack("<I", _STRING) + _text(json.dumps(self.shapes))
        said = b"".join(_text(key) + value for key, value in kept.items())
        said += b"".join(_text(name) + struct.pack("<IQIQ", 1, 1, 0, 0) for name in self.tensors)
        content = struct.pack("<4sIQQ", _MAGIC, 3, len(self.tensors), len(kept)) + said
        return content.ljust(_aligned(len(content), kept) + 4, b"\0")


class _CutShort(Exception):
    """The bytes at hand end before the header does."""


def read_gguf(listing: Listing, name: str) -> GgufHeader:
    """The header of one file; raises CheckpointError where it is none, or ends in it."""
    size, length = listing.sizes[name], _FIRST_READ
    while True:
        content = listing.read(name, min(length, size, _MAX_HEADER))
        if content[:4] != _MAGIC:
            raise CheckpointError(f"{listing.where}/{name} is not a GGUF file (its first bytes are not 'GGUF'); copy it again")
        try:
            return _Reader(content).header()
        except _CutShort:
            if length >= min(size, _MAX_HEADER):
                raise CheckpointError(f"{listing.where}/{name} ends in its GGUF header ({size} bytes); copy it again") from None
        except (ValueError, LookupError, RecursionError) as error:
            raise CheckpointError(f"{listing.where}/{name} has no GGUF header that can be read ({error})") from error
        length *= 8


class _Reader:
    """A header's bytes, from the first on."""

    def __init__(self, content: bytes) -> None:
        self._content, self._at = content, 0

    def header(self) -> GgufHeader:
        _, version, tensors, settings = self._numbers("<4sIQQ")
        if version >= 1 << 16:
            raise ValueError("its numbers are big-endian; convert the model again for this machine")
        if version not in (2, 3):
            raise ValueError(f"version {version}, of which 2 and 3 are known")
        told = {self._string(): self._value() for _ in range(settings)}
        found = [self._tensor() for _ in range(tensors)]
        start = _aligned(self._at, told)
        return GgufHeader(told, {name: _placed(kind, shape, start + offset) for name, kind, shape, offset in found})

    def _tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self._string()
        (dimensions,) = self._numbers("<I")
        if dimensions > 8:
            raise ValueError(f"a tensor of {dimensions} dimensions")
        *shape, kind, offset = self._numbers(f"<{dimensions}QIQ")
        return name, kind, tuple(shape), offset

    def value(self) -> Any:
        """What stands here, as Python has it."""
        (kind,) = self._numbers("<I")
        return self._decoded(kind)

    def _decoded(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._numbers(f"<{_NUMBERS[kind]}")[0]
        inner, count = self._numbers("<IQ")
        if inner in _NUMBERS:
            return [*self._numbers(f"<{count}{_NUMBERS[inner]}")]
        return [self._decoded(inner) for _ in range(count)]

    def _value(self) -> bytes:
        begin = self._at
        (kind,) = self._numbers("<I")
        self._pass(kind)
        return self._content[begin : self._at]

    def _pass(self, kind: int) -> None:
        if kind == _STRING:
            self._string()
        elif kind == _ARRAY:
            inner, count = self._numbers("<IQ")
            if inner in _WIDTHS:
                self._take(_WIDTHS[inner] * count)
            else:
                for _ in range(count):
                    self._pass(inner)
        else:
            self._take(_WIDTHS[kind])

    def _string(self) -> str:
        (length,) = self._numbers("<Q")
        return self._take(length).decode("utf-8", "replace")

    def _numbers(self, layout: str) -> Sequence[int]:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))

    def _take(self, count: int) -> bytes:
        if self._at + count > len(self._content):
            raise _CutShort
        self._at += count
        return self._content[self._at - count : self._at]


def _text(name: str) -> bytes:
    return struct.pack("<Q", len(name.encode())) + name.encode()


def _aligned(at: int, settings: Mapping[str, bytes]) -> int:
    """Where the tensors begin."""
    alignment = int.from_bytes(settings[ALIGNMENT][4:], "little") if ALIGNMENT in settings else 32
    if not alignment:
        raise ValueError("an alignment of 0")
    return -(-at // alignment) * alignment


def _placed(kind: int, shape: tuple[int, ...], begin: int) -> GgufTensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if kind not in list(GGMLQuantizationType):
        raise ValueError(f"a tensor of type {kind}, which a fork of llama.cpp writes; quantize the model again with llama.cpp")
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    return GgufTensor(kind, shape, begin, begin + math.prod(shape) // block * size)
