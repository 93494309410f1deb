"""How a GGUF file scales its rotary embeddings, in transformers' words: transformers 5.17 takes no notice of it.

The settings are those of ggml's docs/gguf.md. Llama 3.1 and later have a factor for each frequency in place of settings, and all of
them follow from two numbers: by how much long waves are stretched, and the context that the model was first trained with.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from featherweight.checkpoint.files import Listing
from featherweight.checkpoint.gguf_header import ARCHITECTURE, GgufHeader, read_gguf
from featherweight.errors import CheckpointError

FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Tensors of a factor for each frequency (Llama 3.1 and later, Phi-3)."""
UNSCALED, F32 = "none", 0
READ = ("gpt-oss",)
"""Architectures whose scaling transformers reads itself."""
PLAIN = ("llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe")
"""Those whose rotary embeddings are scaled by what `rope_parameters` says, all channels of a head alike."""
OF_SOME_LAYERS = ("gemma3",)
"""Those of which the layers without a window alone are scaled, linearly (Gemma 3 of 4 B and more)."""
FULL = "full_attention"
SETTINGS = {
    "linear": {"factor": "factor"},
    "yarn": {"factor": "factor", "original_context_length": "original_max_position_embeddings"},
}
"""By kind: the settings that it has to have, and transformers' names of them."""
BESIDE = ("type", "finetuned")
LOUDER = "rope.scaling.attn_factor"
"""What llama.cpp multiplies queries and keys with, whatever else is said."""
LOW, HIGH = 1.0, 4.0
"""Of Llama 3.1 and all after it: how many waves fit into the first context where stretching is whole, and where there is none."""
FIRST_CONTEXTS = tuple(2**power for power in range(5, 21))
CLOSE = 1e-4


def rotary_scaling(parts: Sequence[Path], header: GgufHeader) -> dict[str, Any]:
    """What `rope_parameters` have to say beside theta; nothing where rotary embeddings are not scaled.

    header: of all parts. Raises CheckpointError for a scaling that is not known here.
    """
    architecture = header.text(ARCHITECTURE) or ""
    if architecture in READ or (said := _said(header, architecture)) is None:
        return {}
    known = architecture in PLAIN or (architecture in OF_SOME_LAYERS and _kind(header, architecture) == "linear")
    found = (_by_settings(header, architecture) or _by_factors(parts, header, architecture)) if known else None
    if found is None:
        raise CheckpointError(
            f"{parts[0]} scales its rotary embeddings ({said}), which transformers takes no notice of in GGUF files: it would be "
            "another model; give the folder that the file was made from"
        )
    return found


def scale(parameters: dict[str, Any], scaling: Mapping[str, Any]) -> None:
    """Have `rope_parameters` say so: those of the layers without a window, where these have their own."""
    parameters.get(FULL, parameters).update(scaling)


def _said(header: GgufHeader, architecture: str) -> str | None:
    """The setting or the tensor by which they are scaled."""
    kind, louder = _kind(header, architecture), f"{architecture}.{LOUDER}"
    if kind != UNSCALED:
        return f"{architecture}.rope.scaling.type is {kind}"
    if header.number(louder) not in (None, 1):
        return louder
    return next((name for name in FACTORS if name in header.tensors), None)


def _kind(header: GgufHeader, architecture: str) -> str:
    """The kind of scaling; linear where a file names none and has a factor, as llama.cpp takes it."""
    told = header.text(f"{architecture}.rope.scaling.type")
    return ("linear" if _factor(header, architecture) else UNSCALED) if told is None else told


def _factor(header: GgufHeader, architecture: str) -> float | None:
    """Under the name of today, or of files of 2023; None where it is 1, or 0, which stands for none."""
    found = (header.number(f"{architecture}.rope.{name}") for name in ("scaling.factor", "scale_linear"))
    return next((factor for factor in found if factor not in (None, 0, 1)), None)


def _by_settings(header: GgufHeader, architecture: str) -> dict[str, Any] | None:
    """Of a kind whose settings are all there, and no others, nor factors beside them."""
    start = f"{architecture}.rope.scaling."
    kind = _kind(header, architecture)
    wanted = SETTINGS.get(kind, {})
    there = {key.removeprefix(start) for key in header.settings if key.startswith(start)} - {*BESIDE}
    there |= {"factor"} if _factor(header, architecture) else set()
    if not wanted or there != set(wanted) or any(name in header.tensors for name in FACTORS):
        return None
    told = {name: header.number(f"{start}{key}") for key, name in wanted.items()} | {"factor": _factor(header, architecture)}
    whole = {name: int(value) if name != "factor" else value for name, value in told.items() if value is not None}
    return {"rope_type": kind, **whole} if len(whole) == len(wanted) else None


def _by_factors(parts: Sequence[Path], header: GgufHeader, architecture: str) -> dict[str, Any] | None:
    """Llama 3's scaling that has these very factors."""
    factors, theta = list(_factors(parts)), header.number(f"{architecture}.rope.freq_base") or 10_000.0
    width = header.number(f"{architecture}.rope.dimension_count")
    if not factors or _kind(header, architecture) != UNSCALED or width != 2 * len(factors):
        return None
    stretch, waves = max(factors), [2 * math.pi * theta ** (2 * at / width) for at in range(len(factors))]
    for first in FIRST_CONTEXTS:
        expected = [_divisor(wave, stretch, first) for wave in waves]
        if all(math.isclose(one, other, rel_tol=CLOSE) for one, other in zip(factors, expected, strict=True)):
            told = {"low_freq_factor": LOW, "high_freq_factor": HIGH, "original_max_position_embeddings": first}
            return {"rope_type": "llama3", "factor": stretch, **told}
    return None


def _divisor(wave: float, stretch: float, first: int) -> float:
    """By what a frequency is divided, of a wave of so many tokens (Llama 3.1's scaling, as transformers and llama.cpp have it)."""
    share = min(max((first / wave - LOW) / (HIGH - LOW), 0.0), 1.0)
    return 1 / ((1 - share) / stretch + share)


def _factors(parts: Sequence[Path]) -> Iterator[float]:
    """The numbers of Llama 3's tensor; none where it is not there, or other such tensors are."""
    for part in parts:
        tensors = read_gguf(Listing.of(part.parent), part.name).tensors
        tensor = tensors.get(FACTORS[0])
        if tensor is not None and tensor.kind == F32 and not any(name in tensors for name in FACTORS[1:]):
            with part.open("rb") as file:
                file.seek(tensor.begin)
                yield from (value for (value,) in struct.iter_unpack("<f", file.read(tensor.end - tensor.begin)))
