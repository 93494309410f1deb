"""What a checkpoint is, whatever it is called and wherever it lies: a digest of all that the product reads of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from featherweight.checkpoint.files import (
    ADAPTER,
    ADAPTER_WEIGHTS,
    CONFIG,
    INDEX,
    PICKLE_INDEX,
    WEIGHTS,
    Listing,
    files_of,
    find_weights,
    has_weights,
    header_bytes,
    is_companion,
    read_header,
    read_json,
)
from featherweight.errors import CheckpointError
from featherweight.model.sparsity import FILE as SPARSITY
from featherweight.store.artifact import content_digest


def content_identity(listing: Listing) -> str:
    """sha256 of a complete checkpoint's content: every tensor by its name, type, shape and bytes, and the other files by theirs.

    The same tensors in other shards are the same checkpoint; what lies beside (an optimizer's state, a shard that the index does
    not name) is none of it. Reads every byte once. Raises CheckpointError where a file changes while it is read.
    """
    tensors: dict[str, Any] = {}
    files: dict[str, str] = {}
    shards = _shards(listing)
    for name in read_by_the_product(listing):
        if name in shards:
            sought, found = shards[name], _tensors(listing, name)
            tensors |= {tensor: told for tensor, told in found.items() if sought is None or tensor in sought}
        elif name == ADAPTER_WEIGHTS[0]:
            tensors |= {f"adapter {tensor}": told for tensor, told in _tensors(listing, name).items()}
        elif name not in (INDEX, PICKLE_INDEX):
            files[name] = _sha256(listing, name)
    return content_digest([files, tensors])


def read_by_the_product(listing: Listing) -> list[str]:
    """Names of the files that a checkpoint is made of; its code only where its configuration asks for it."""
    code = CONFIG in listing.sizes and "auto_map" in read_json(listing, CONFIG)
    return files_of(listing, allow_pickle=True, trust_remote_code=code)


def may_be_read(name: str) -> bool:
    """Whether the product may read a file of that name, told without a look into any: no optimizer's state, log or note."""
    if name in (CONFIG, INDEX, PICKLE_INDEX, SPARSITY, ADAPTER, *ADAPTER_WEIGHTS) or is_companion(name):
        return True
    weights = name.startswith("pytorch_model") and name.endswith(".bin")
    return "/" not in name and (weights or name.endswith((".safetensors", ".py")))


def _shards(listing: Listing) -> dict[str, set[str] | None]:
    """The safetensors of a whole model, with the tensors that the index seeks there; None where all count."""
    if not has_weights(listing):
        return {}
    weights = find_weights(listing, allow_pickle=True)
    if weights.pickled:
        return {}
    if weights.index is None:
        return {WEIGHTS: None}
    return {file: {tensor for tensor, place in weights.index.items() if place == file} for file in weights.files}


def _tensors(listing: Listing, name: str) -> dict[str, list[Any]]:
    """[type, shape, sha256 of the bytes] of each tensor of a safetensors file."""
    header, start = read_header(listing, name), header_bytes(listing, name)
    content, told = Content(listing, name), {}
    for tensor, entry in sorted(header.items(), key=lambda one: (one[1]["data_offsets"], one[0])):
        begin, end = entry["data_offsets"]
        content.pass_to(start + begin)
        told[tensor] = [entry["dtype"], entry["shape"], content.sha256_to(start + end)]
    return told


def _sha256(listing: Listing, name: str) -> str:
    return Content(listing, name).sha256_to(listing.sizes[name])


class Content:
    """A file's bytes from its beginning to its end, a stretch at a time."""

    def __init__(self, listing: Listing, name: str) -> None:
        self._where, self._pieces = f"{listing.where}/{name}", listing.pieces(name)
        self._piece, self._at = memoryview(b""), 0

    def sha256_to(self, end: int) -> str:
        """sha256 of the bytes from where it stands to `end`."""
        digest = hashlib.sha256()
        for stretch in self._to(end):
            digest.update(stretch)
        return digest.hexdigest()

    def pass_to(self, end: int) -> None:
        """Leave out the bytes before `end`."""
        for _ in self._to(end):
            continue

    def _to(self, end: int) -> Iterator[memoryview]:
        while self._at < end:
            if not self._piece:
                self._piece = memoryview(next(self._pieces, b""))
            if not self._piece:
                raise CheckpointError(f"{self._where} became shorter while it was read; look again when it is at rest")
            stretch, self._piece = self._piece[: end - self._at], self._piece[end - self._at :]
            self._at += len(stretch)
            yield stretch
