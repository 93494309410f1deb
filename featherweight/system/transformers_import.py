"""What transformers finds out anew at each import, in more than a CPU second.

Which distribution a package comes from, by the records of all that are installed: left until it matters. Which of its modules
defines which name, by its 2,500 files, read twice: kept for this user.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from featherweight.system.kept import keep, kept

MODULE = "transformers.utils.import_utils"
NAMES = "names-of-transformers"
READS = "create_import_structure_from_path"
Structure = dict[Any, Any]
"""Names by module, by what those need (a frozenset), by package; packages may nest."""


@contextmanager
def shortened(module: ModuleType) -> Iterator[None]:
    """Around the execution of transformers' module of that name, which is changed afterwards."""
    from importlib import metadata

    real = metadata.packages_distributions
    metadata.packages_distributions = lambda: Distributions(real)
    try:
        yield
    finally:
        metadata.packages_distributions = real
    models = Path(str(module.__file__)).parents[1] / "models"
    setattr(module, READS, _reading_once(models, getattr(module, READS)))


class Distributions(dict[str, list[str]]):
    """What `packages_distributions` gives, asked for when it is to be told of a package whose name no distribution bears."""

    def __init__(self, ask: Callable[[], Any]) -> None:
        super().__init__()
        self.ask = ask

    def get(self, package: str, default: Any = None) -> Any:
        """The names of the distributions that a package comes from."""
        from importlib import metadata

        if not self:
            try:
                return [metadata.distribution(package).name]
            except metadata.PackageNotFoundError:
                self.update(self.ask())
        return super().get(package, default)


def _reading_once(models: Path, read: Callable[[Path | str], Structure]) -> Callable[[Path | str], Structure]:
    """`read`, which finds the names of a folder's modules; those of `models` as they were kept."""
    seen: list[Structure] = []

    def read_once(path: Path | str) -> Structure:
        if Path(path) not in (models, models / "__init__.py"):
            return read(path)
        if not seen:
            seen.append(known(models) or learnt(models, read(models)))
        return seen[0]

    return read_once


def known(models: Path) -> Structure | None:
    """What this user kept of the package as it lies there now, or None."""
    try:
        return _decoded(kept(NAMES, _state(models)))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def learnt(models: Path, structure: Structure) -> Structure:
    """Keep it where this user's cache can be written to; the same structure."""
    keep(NAMES, _state(models), _encoded(structure))
    return structure


def _state(models: Path) -> list[Any]:
    """What a change of the installed package changes: where it lies, and when a file last came to or left a folder of it."""
    with os.scandir(models) as entries:
        latest = max((entry.stat().st_mtime_ns for entry in entries if entry.is_dir()), default=0)
    return [str(models), models.stat().st_mtime_ns, latest]


def _encoded(structure: Structure | set[str]) -> Any:
    """JSON has no sets as keys: a dictionary is an object that holds pairs, a set a list."""
    if isinstance(structure, set):
        return sorted(structure)
    pairs = [[sorted(key) if isinstance(key, frozenset) else key, _encoded(value)] for key, value in structure.items()]
    return {"pairs": pairs}


def _decoded(encoded: Any) -> Any:
    if isinstance(encoded, list):
        return set(encoded)
    return {frozenset(key) if isinstance(key, list) else key: _decoded(value) for key, value in encoded["pairs"]}
