"""Artifacts: directories of files whose manifest, written last, says what they are and where they come from."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from featherweight.errors import IntegrityError

MANIFEST = "manifest.json"


class File(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(frozen=True)
    sha256: str
    size: int


class Manifest(BaseModel):
    """What an artifact is. `digest` covers the files' names and bytes only: equal content has equal digests."""

    model_config = ConfigDict(frozen=True)
    digest: str
    files: dict[str, File]
    stage: str
    node: str
    key: str
    spec: dict[str, Any]
    seed: int
    parents: dict[str, str]
    metrics: dict[str, float]
    environment: dict[str, str]
    machine: dict[str, Any]
    started: str
    finished: str

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of an artifact folder; raises IntegrityError where there is none."""
        path = folder / MANIFEST
        try:
            return cls.model_validate_json(path.read_bytes() if path.is_file() else b"")
        except (OSError, ValueError) as error:
            raise IntegrityError(f"{folder} is not a complete artifact: no readable {MANIFEST}") from error

    def write(self, folder: Path) -> None:
        """Write the manifest so that it is there whole or not at all."""
        part = folder / f"{MANIFEST}.part"
        part.write_text(self.model_dump_json(indent=1))
        part.replace(folder / MANIFEST)


class ArtifactRef(BaseModel):
    """Where an artifact lies, and the digest that its bytes must have. This is all that Prefect persists."""

    model_config = ConfigDict(frozen=True)
    uri: str
    digest: str
    run_id: str
    node: str
    seconds: float
    metrics: dict[str, float]


def file_sha256(path: Path) -> str:
    """Streaming sha256 of a file.

    Raises IntegrityError for a pipe or a device, which might not end, a link to no file, and what this user may not read.
    """
    try:
        with open(path, "rb", opener=_unless_it_waits) as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise IntegrityError(f"{path} is no plain file")
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except PermissionError as error:
        raise IntegrityError(f"{path} cannot be read by this user ({error.strerror})") from error
    except OSError as error:
        if error.errno != errno.ENXIO and not Path(path).is_symlink():
            raise
        raise IntegrityError(f"{path} is no plain file ({error.strerror})") from error


def _unless_it_waits(path: str, flags: int) -> int:
    """Open for reading, a pipe that nobody writes to as well."""
    return os.open(path, flags | os.O_NONBLOCK)


def describe_files(folder: Path) -> dict[str, File]:
    """sha256 and size of every file below `folder`, by relative name; the manifest itself is left out.

    Raises IntegrityError for what is neither a file nor a folder, as a link to a folder is, which leads elsewhere or round.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in _below(folder))
    names = [name for name in names if name != MANIFEST]
    with ThreadPoolExecutor(4) as pool:
        sums = list(pool.map(lambda name: file_sha256(folder / name), names))
    return {n: File(sha256=s, size=(folder / n).stat().st_size) for n, s in zip(names, sums, strict=True)}


def _below(folder: Path) -> Iterator[Path]:
    """All that is no folder."""
    for parent, inside, names in os.walk(folder):
        yield from (Path(parent, name) for name in names)
        yield from (path for path in (Path(parent, name) for name in inside) if path.is_symlink())


def merkle_digest(files: dict[str, File]) -> str:
    """sha256 over the sorted (name, sha256) pairs."""
    lines = "".join(f"{files[name].sha256}  {name}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode()).hexdigest()


def verify(folder: Path, digest: str) -> Manifest:
    """Check that `folder` holds the files of its manifest, bit for bit, and that they are those of `digest`.

    Raises IntegrityError naming the first file that differs.
    """
    manifest = Manifest.read(folder)
    found = describe_files(folder)
    for name in sorted(manifest.files.keys() | found.keys()):
        if manifest.files.get(name) != found.get(name):
            state = "missing" if name not in found else "unexpected" if name not in manifest.files else "altered"
            raise IntegrityError(f"artifact {folder}: file {name} is {state}")
    if merkle_digest(found) != digest or manifest.digest != digest:
        raise IntegrityError(f"artifact {folder} has digest {manifest.digest[:12]}, expected {digest[:12]}")
    return manifest


def content_digest(value: Any) -> str:
    """sha256 of a JSON-able value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
