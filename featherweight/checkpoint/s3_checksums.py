"""What an S3 server tells of an object's content, compared with the file that was made of it."""

from __future__ import annotations

import base64
import hashlib
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Head = Callable[[], Mapping[str, Any]]
_CHUNK = 1 << 20
# Part sizes of the usual uploaders, for servers that do not tell the size of a part.
_PART_SIZES = tuple(megabytes << 20 for megabytes in (8, 5, 10, 15, 16, 25, 32, 50, 64, 100, 128, 256, 512, 1024))


def is_md5_of(etag: str, path: Path) -> bool:
    """Whether an ETag is the MD5 of the file, as it is of an object that was uploaded in one piece and not encrypted."""
    return re.fullmatch("[0-9a-f]{32}", etag) is not None and _hexdigest(path, "md5") == etag


def matches(path: Path, etag: str, head: Mapping[str, Any], part: Head) -> bool | None:
    """Compare a file whose MD5 the ETag is not; None where the server gives nothing to compare with.

    head: what the server tells of the object, checksums included. part: asks what it tells of the object's first part.
    An ETag is the MD5 of the content, or of its parts' MD5s, unless the server encrypts with keys of its own.
    """
    checked = _matches_checksum(head, path)
    if checked is None and not _is_opaque(head):
        return _matches_etag(path, etag, part)
    return checked


def _hexdigest(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _is_opaque(head: Mapping[str, Any]) -> bool:
    """Whether the ETag is no MD5, by the rules of S3's encryption."""
    return head.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in head


def _matches_checksum(head: Mapping[str, Any], path: Path) -> bool | None:
    """Compare with a checksum of the whole object; None where there is none that we can compute."""
    if head.get("ChecksumType", "FULL_OBJECT") != "FULL_OBJECT":
        return None
    computed: dict[str, Callable[[], bytes]] = {
        "ChecksumSHA256": lambda: bytes.fromhex(_hexdigest(path, "sha256")),
        "ChecksumSHA1": lambda: bytes.fromhex(_hexdigest(path, "sha1")),
        "ChecksumCRC32": lambda: _crc32(path).to_bytes(4, "big"),
    }
    for name, compute in computed.items():
        # A dash marks the checksum of a multipart upload's checksums.
        if name in head and "-" not in head[name]:
            return base64.b64encode(compute()).decode() == head[name]
    return None


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def _matches_etag(path: Path, etag: str, part: Head) -> bool | None:
    """Compare with an ETag that is an MD5, or `MD5-PARTS`; None where it is neither, or the parts' size is unknown."""
    match, length = re.fullmatch(r"[0-9a-f]{32}(?:-(\d+))?", etag), path.stat().st_size
    if match is None:
        return None
    if match[1] is None:
        return False  # a plain MD5, compared before
    first = part()
    parts = int(match[1])
    known = first.get("PartsCount") == parts
    for size in (first["ContentLength"],) if known else _PART_SIZES:
        if -(-length // size) == parts and multipart_etag(path, size) == etag:
            return True
    # Parts of uneven sizes, or of a size that we did not guess, prove nothing.
    return False if known and -(-length // first["ContentLength"]) == parts else None


def multipart_etag(path: Path, part_size: int) -> str:
    """The ETag that S3 gives a file uploaded in parts of `part_size` bytes."""
    digests = []
    with path.open("rb") as file:
        while True:
            part, left = hashlib.md5(usedforsecurity=False), part_size
            while left and (chunk := file.read(min(left, _CHUNK))):
                part.update(chunk)
                left -= len(chunk)
            if left == part_size:
                break
            digests.append(part.digest())
    return f"{hashlib.md5(b''.join(digests), usedforsecurity=False).hexdigest()}-{len(digests)}"
