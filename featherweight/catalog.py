"""Catalogs: what is known by a name, a line each, and loaded only when it is asked for.

Another package adds to a catalog through an entry point of the catalog's group, such as
`[project.entry-points."featherweight.quantizers"]` with `mine = "package.module:ATTRIBUTE"`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from featherweight.errors import RecipeError, nearest

Entry = TypeVar("Entry")


class Catalog(Generic[Entry]):
    """Names and where each is defined, as 'module:attribute'. `kind` is what an error calls one of them."""

    def __init__(self, kind: str, group: str, ours: Mapping[str, str]) -> None:
        self.kind, self.group, self._ours = kind, group, dict(ours)

    @cached_property
    def references(self) -> dict[str, str]:
        """Ours first, then those of other packages. Raises RecipeError where two claim one name."""
        found = dict(self._ours)
        for point in entry_points(group=self.group):
            if found.setdefault(point.name, point.value) != point.value:
                raise RecipeError(f"{self.kind} '{point.name}' is claimed by {found[point.name]} and {point.value}; uninstall one")
        return found

    def reference(self, name: str) -> str:
        """Where `name` is defined; raises RecipeError with the nearest known name."""
        try:
            return self.references[name]
        except KeyError as error:
            raise RecipeError(f"unknown {self.kind} '{name}'; {nearest(name, sorted(self.references))}") from error

    def __getitem__(self, name: str) -> Entry:
        """The entry itself, imported now. Raises RecipeError for an unknown name, or where another package's does not import."""
        reference = self.reference(name)
        module, _, attribute = reference.partition(":")
        try:
            return getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            if name in self._ours:
                raise
            raise RecipeError(f"{self.kind} '{name}' ({reference}) cannot be loaded: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.references)

    def __contains__(self, name: object) -> bool:
        return name in self.references
