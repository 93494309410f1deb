"""What CTranslate2 holds while it serves, by its own file."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from featherweight.errors import IntegrityError
from featherweight.runtimes.bytes_read import ROLES, HeldTensor, Role

WIDTHS = (4, 1, 2, 4, 2, 2)
"""Bytes of float32, int8, int16, int32, float16, bfloat16, as their ids in the file count them."""
FLOATS = (0, 4, 5)


def model_tensors(path: Path, compute_type: str) -> Iterator[HeldTensor]:
    """`model.bin` (see ctranslate2.specs.model_spec). int8 weights become float32 where it computes in that, floats 16 bits
    where it computes in those, scales excepted.
    """
    sixteen = compute_type.endswith(("float16", "bfloat16"))
    try:
        with path.open("rb") as file:
            found, names = _variables(file)
    except struct.error as error:
        raise IntegrityError(f"{path} ends early; export the variant again") from error
    for name, (shape, kind) in found.items():
        weight = name.removesuffix("_scale")  # which has no second name where its weight has one
        role = max((_role(alias) for alias in (name, *names.get(weight, ()))), key=ROLES.index)
        rounded = sixteen and kind in FLOATS and not name.endswith("_scale")
        width = 4 if compute_type == "float32" else 2 if rounded else WIDTHS[kind]
        yield HeldTensor(role, math.prod(shape) * width, shape[0] if shape else 0)


def _variables(file: BinaryIO) -> tuple[dict[str, tuple[list[int], int]], dict[str, list[str]]]:
    """(shape, id of the type) of every variable, and the other names of each."""
    read = _Reader(file)
    read.number("I"), read.text(), read.number("I")  # version of the format, name and revision of the model
    found: dict[str, tuple[list[int], int]] = {}
    for _ in range(read.number("I")):
        name = read.text()
        shape = [read.number("I") for _ in range(read.number("B"))]
        found[name] = shape, read.number("B")
        file.seek(read.number("I"), 1)
    aliases: dict[str, list[str]] = {name: [] for name in found}
    for _ in range(read.number("I")):
        alias, name = read.text(), read.text()
        aliases[name].append(alias)
    return found, aliases


def _role(name: str) -> Role:
    if "embeddings" in name or "position_encodings" in name:
        return "row"
    if name.startswith("encoder/") or re.search(r"/attention/linear_1/", name):
        return "once"
    return "step"


class _Reader:
    """Numbers and texts of CTranslate2's file."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def number(self, form: str) -> int:
        return int(struct.unpack(f"<{form}", self.file.read(struct.calcsize(form)))[0])

    def text(self) -> str:
        return self.file.read(self.number("H"))[:-1].decode()
