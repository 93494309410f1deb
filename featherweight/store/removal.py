"""Removing a folder of the artifact store: hidden first, in one step, so that nobody finds half of it; until then it comes back.

Who asks for what is hidden finds nothing, and makes it anew. No link is followed, neither to the folder nor in it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from featherweight.errors import IntegrityError
from featherweight.store.artifact import MANIFEST
from featherweight.store.tracking import open_artifacts
from featherweight.store.workspace import local_path

HIDDEN = ".gone-"


@dataclass(frozen=True)
class Bytes:
    """One stored file: which one it is, under how many names it lies, and its size."""

    file: Any
    names: int
    size: int


class Folder(Protocol):
    """A folder of the store."""

    def files(self) -> list[Bytes]:
        """What it holds, hidden or not; nothing where it is not there. Raises IntegrityError where it lies outside the store."""

    def hide(self) -> None:
        """Let nobody find it any more."""

    def restore(self) -> None:
        """Let it be found again."""

    def remove(self) -> None:
        """Remove what was hidden, and what was left of an earlier removal that was killed."""


def freed(files: Iterable[Bytes]) -> int:
    """Bytes that come free with all of these: what lies under further names stays."""
    found: Counter[Any] = Counter()
    known: dict[Any, Bytes] = {}
    for one in files:
        found[one.file] += 1
        known[one.file] = one
    return sum(one.size for file, one in known.items() if found[file] >= one.names)


def folder_at(uri: str, store: Path, tracking_uri: str, marker: str = MANIFEST) -> Folder:
    """The folder of a URI. store: below which it has to lie where it is a local one. marker: the file that makes it whole."""
    local = local_path(uri)
    if local is not None:
        return LocalFolder(store, local)
    if ".." in uri.split("/"):
        raise IntegrityError(f"{uri} leads elsewhere; it is left alone")
    return RemoteFolder(uri, tracking_uri, marker)


def _is_same(one: Path, other: Path) -> bool:
    """Whether both are one folder: a workspace goes by several names where it is behind a link."""
    try:
        return one == other.absolute() or one.samefile(other)
    except OSError:
        return False


class LocalFolder:
    """A folder below `store`, reached from there step by step, so that no link on the way, also one made meanwhile, leads out."""

    def __init__(self, store: Path, folder: Path) -> None:
        self.folder = folder
        root = next((one for one in reversed(folder.parents) if _is_same(one, store)), None)
        if root is None:
            raise IntegrityError(f"{folder} is outside the store {store}; it is left alone")
        parts = folder.relative_to(root).parts
        if not parts or ".." in folder.parts:
            raise IntegrityError(f"{folder} is no folder of the store {store}; it is left alone")
        self._store, self._above, self._name = store, parts[:-1], parts[-1]

    def files(self) -> list[Bytes]:
        with self._parent() as parent:
            return [] if parent is None else [one for name in self._names(parent) for one in _files(name, parent)]

    def hide(self) -> None:
        with self._parent() as parent:
            if parent is not None and _is_folder(self._name, parent):
                os.rename(self._name, f"{HIDDEN}{self._name}-{secrets.token_hex(4)}", src_dir_fd=parent, dst_dir_fd=parent)

    def restore(self) -> None:
        with self._parent() as parent:
            if parent is not None and not _is_there(self._name, parent):
                for name in self._hidden(parent)[:1]:
                    os.rename(name, self._name, src_dir_fd=parent, dst_dir_fd=parent)

    def remove(self) -> None:
        with self._parent() as parent:
            for name in self._hidden(parent) if parent is not None else ():
                shutil.rmtree(name, dir_fd=parent)

    def _names(self, parent: int) -> list[str]:
        return [*([self._name] if _is_folder(self._name, parent) else []), *self._hidden(parent)]

    def _hidden(self, parent: int) -> list[str]:
        return [name for name in os.listdir(parent) if name.startswith(f"{HIDDEN}{self._name}-") and _is_folder(name, parent)]

    @contextmanager
    def _parent(self) -> Iterator[int | None]:
        """A handle of the folder around it, None where that is not there. Raises IntegrityError where a link leads to it."""
        opened: list[int] = []
        try:
            opened.append(os.open(self._store, os.O_RDONLY | os.O_DIRECTORY))
            for part in self._above:
                if not _is_folder(part, opened[-1]):
                    yield None
                    return
                opened.append(os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=opened[-1]))
            yield opened[-1]
        finally:
            for handle in opened:
                os.close(handle)


def _is_there(name: str, parent: int) -> bool:
    try:
        os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _is_folder(name: str, parent: int) -> bool:
    """Whether it is a folder itself; False where it is not there. Raises IntegrityError for a link."""
    if not _is_there(name, parent):
        return False
    mode = os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode
    if stat.S_ISLNK(mode):
        raise IntegrityError(f"{name} is a link, which nobody puts into the store; it is left alone")
    return stat.S_ISDIR(mode)


def _files(name: str, parent: int) -> Iterator[Bytes]:
    for _, _, files, handle in os.fwalk(name, dir_fd=parent):
        for file in files:
            told = os.stat(file, dir_fd=handle, follow_symlinks=False)
            yield Bytes((told.st_dev, told.st_ino), told.st_nlink, told.st_size)


class RemoteFolder:
    """A folder of a remote store; it is hidden by removing the file that says that it is whole."""

    def __init__(self, uri: str, tracking_uri: str, marker: str) -> None:
        self.uri, self._marker = uri, marker
        self._repository = open_artifacts(uri, tracking_uri)
        self._kept: bytes | None = None

    def files(self) -> list[Bytes]:
        return list(self._below(""))

    def _below(self, path: str) -> Iterator[Bytes]:
        for one in self._repository.list_artifacts(path or None):
            if one.is_dir:
                yield from self._below(one.path)
            else:
                yield Bytes((self.uri, one.path), 1, one.file_size or 0)

    def hide(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            if any(one.path == self._marker for one in self._repository.list_artifacts()):
                self._kept = Path(self._repository.download_artifacts(self._marker, folder)).read_bytes()
        if self._kept is not None:
            self._repository.delete_artifacts(self._marker)

    def restore(self) -> None:
        if self._kept is None:
            return
        with tempfile.TemporaryDirectory() as folder:
            marker = Path(folder) / self._marker
            marker.write_bytes(self._kept)
            self._repository.log_artifact(str(marker))

    def remove(self) -> None:
        self._repository.delete_artifacts()
