"""A GGUF model's files: one, or NAME-00001-of-00003.gguf and so on, as llama.cpp's gguf-split leaves big ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from featherweight.checkpoint.files import Listing
from featherweight.checkpoint.gguf_faults import require_model
from featherweight.checkpoint.gguf_header import ALIGNMENT, GgufHeader, read_gguf
from featherweight.checkpoint.identity import Content
from featherweight.errors import CheckpointError
from featherweight.store.artifact import content_digest

NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
"""Of a part: which it is, from 0 on, of how many, and how many tensors all have."""
PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def names_of_parts(name: str) -> tuple[str, ...]:
    """The names of all files of the model that the file `name` is one of, in order."""
    found = PART.search(name)
    if found is None:
        return (name,)
    return tuple(f"{name[: found.start()]}-{part:05}-of-{found[2]}.gguf" for part in range(1, int(found[2]) + 1))


def models_among(names: Iterable[str]) -> set[tuple[str, ...]]:
    """The GGUF models among these names, each as the names of all its parts, there or not."""
    return {names_of_parts(name) or (name,) for name in names if name.endswith(".gguf")}


def only_model(names: Iterable[str]) -> tuple[str, ...] | None:
    """The parts of the one GGUF model among these names; None where there are several models, or none."""
    models = models_among(names)
    return models.pop() if len(models) == 1 else None


def lacking_of(parts: Sequence[str], listing: Listing) -> str | None:
    """What a model of these parts still lacks, by the parts' own count and each header's word; None when it is complete."""
    missing = [name for name in parts if name not in listing.sizes]
    if missing:
        return f"{listing.where} lacks {missing[0]}: {len(parts) - len(missing)} of {len(parts)} parts are there"
    try:
        for name in parts:
            end = read_gguf(listing, name).end
            if listing.sizes[name] < end:
                return f"{listing.where}/{name} is truncated: {listing.sizes[name]} of {end} bytes"
    except CheckpointError as error:
        return str(error)
    return None


def gguf_identity(parts: Sequence[str], listing: Listing) -> str:
    """sha256 of a model's content: its settings, and every tensor by name, type, shape and bytes; the same however it is split."""
    headers = [read_gguf(listing, name) for name in parts]
    settings = {key: value.hex() for key, value in headers[0].settings.items() if not key.startswith("split.")}
    tensors: dict[str, Any] = {}
    for name, header in zip(parts, headers, strict=True):
        tensors |= _tensors(Content(listing, name), header)
    return content_digest(["gguf", settings, tensors])


def _tensors(content: Content, header: GgufHeader) -> dict[str, Any]:
    told = {}
    for name, tensor in sorted(header.tensors.items(), key=lambda one: (one[1].begin, one[0])):
        content.pass_to(tensor.begin)
        told[name] = [tensor.kind, tensor.shape, content.sha256_to(tensor.end)]
    return told


def parts_of(file: Path) -> list[Path]:
    """All files of the model that `file` is one of; raises CheckpointError where one is missing."""
    parts = [file.with_name(name) for name in names_of_parts(file.name)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing and len(parts) > 1:
        raise CheckpointError(f"{file} is one of {len(parts)} parts, and {missing[0]} is missing; copy all of them")
    return parts


def whole_header(parts: Sequence[Path]) -> GgufHeader:
    """What the first part says of the model, and the tensors of all; raises CheckpointError for one cut short, or no model."""
    headers = []
    for part in parts:
        listing = Listing.of(part.parent)
        header = read_gguf(listing, part.name)
        if listing.sizes[part.name] < header.end:
            raise CheckpointError(f"{part} is truncated: {listing.sizes[part.name]} of {header.end} bytes; copy it again")
        headers.append(header)
    _require_one_model(parts, headers)
    whole = GgufHeader(headers[0].settings, {name: tensor for header in headers for name, tensor in header.tensors.items()})
    require_model(whole, str(parts[0]))
    return whole


def _require_one_model(parts: Sequence[Path], headers: Sequence[GgufHeader]) -> None:
    """Refuse parts that are not those of one split model, each in its place: by their names alone others are taken for them."""
    settings, tensors = headers[0].settings, dict[str, Path]()
    total, count = headers[0].number(TENSORS), sum(len(header.tensors) for header in headers)
    for number, (part, header) in enumerate(zip(parts, headers, strict=True)):
        of = header.number(COUNT)
        if of not in (None, 0, len(parts)) or header.number(NUMBER) not in (None, number):
            which = f"part {(header.number(NUMBER) or 0) + 1:g} of {of or len(parts):g}"
            raise CheckpointError(
                f"{part} says that it is {which}, and is taken as {number + 1} of {len(parts)}; give each part the name that it had"
            )
        odd = next((key for key, value in header.settings.items() if _differs(key, value, settings)), None)
        if odd:
            raise CheckpointError(f"{part} says another {odd} than {parts[0].name}: parts of two models; copy all parts of one")
        if twice := next((name for name in header.tensors if name in tensors), None):
            raise CheckpointError(f"{part} and {tensors[twice].name} both hold {twice}: parts of two models; copy all parts of one")
        tensors |= dict.fromkeys(header.tensors, part)
    if total is not None and total != count:
        raise CheckpointError(
            f"{parts[0]} counts {total:g} tensors in all parts, and there are {count}; copy all parts of one model"
        )


def _differs(key: str, value: bytes, first: Mapping[str, bytes]) -> bool:
    """Whether a setting is another in the first part; where tensors lie, and which part it is, each says of itself."""
    return key not in (ALIGNMENT, NUMBER) and key in first and first[key] != value


def join(parts: Sequence[Path], out: Path) -> Path:
    """Write the parts as one file, what the first says of the model with the tensors of all; their bytes stay as they are.

    Where they lie is the writer's own: with the parts' word on that (an alignment of 8) the tensors were read from other places.
    """
    import gguf

    readers = [gguf.GGUFReader(part) for part in parts]
    told = readers[0].fields
    writer = gguf.GGUFWriter(out, str(told[gguf.Keys.General.ARCHITECTURE].contents()))
    for name, field in told.items():
        if name not in (gguf.Keys.General.ARCHITECTURE, ALIGNMENT) and not name.startswith(("GGUF.", "split.")):
            _add(writer, name, field)
    for reader in readers:
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _add(writer: Any, name: str, field: Any) -> None:
    from gguf import GGUFValueType

    inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
    writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
