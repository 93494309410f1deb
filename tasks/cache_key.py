"""What a node's cache key knows: the code and the libraries that can change its result."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module
from typing import Any

from featherweight.recipe.nodes import Node
from featherweight.store.artifact import content_digest
from featherweight.system import toolchains
from featherweight.system.kept import keep, kept
from featherweight.system.toolchains import ALL_PACKAGES
from tasks.code_slice import OURS, slice_of, state_of_files

DIGESTS = "digests-of-code"


def library_versions(names: Iterable[str]) -> dict[str, str]:
    """Installed versions; a library that is not installed is said to be absent."""
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


@cache
def code_digest(reference: str) -> str:
    """Digest of the code that what 'module:attribute' names can run (see code_slice).

    To follow it takes seconds for a plan's references, so a user's are kept until a file of this project is another.
    """
    state = state_of_files() if reference.partition(".")[0] in OURS else None
    if state is None:
        return content_digest(slice_of(reference))
    known = kept(DIGESTS, state) or {}
    if reference not in known:
        known[reference] = content_digest(slice_of(reference))
        keep(DIGESTS, state, known)
    return str(known[reference])


def code_references(function: Callable[..., Any], node: Node) -> tuple[str, ...]:
    """Where the code starts that makes a node: its stage, its spec, whose methods a stage may ask, and its parts."""
    kind = type(node.spec)
    return (f"{function.__module__}:{function.__name__}", f"{kind.__module__}:{kind.__qualname__}", *node.parts)


def made_by(function: Callable[..., Any], node: Node) -> dict[str, Any]:
    """What the key of a node knows of the code that makes it, by reference; of a method or engine its libraries as well."""
    digests: dict[str, Any] = {reference: code_digest(reference) for reference in code_references(function, node)}
    return digests | {reference: _part(reference) for reference in node.parts}


def _part(reference: str) -> list[Any]:
    """The code of a part, the versions of its libraries, what its toolchains hold."""
    installed = [name for toolchain in _toolchains(_load(reference)) for name in toolchains.distributions(toolchain)]
    return [code_digest(reference), library_versions(_libraries(reference)), installed]


def toolchain_versions(node: Node) -> dict[str, str]:
    """What the toolchains of a node's engines hold: versions by 'TOOLCHAIN/DISTRIBUTION', and digits for all packages of each."""
    parts = [_load(reference) for reference in node.parts]
    asked = [(name, one) for part in parts for name in _toolchains(part) for one in (*part.toolchain_libraries, ALL_PACKAGES)]
    found = {f"{name}/{library}": toolchains.version_of(name, library) for name, library in asked}
    return {name: version for name, version in found.items() if version != "absent"}


def _toolchains(part: Any) -> list[str]:
    return sorted({name for kind in ("toolchain", "writes_with", "gains_by") if (name := getattr(part, kind, None))})


def libraries_of(node: Node) -> tuple[str, ...]:
    """The distributions that these methods and engines add to those of the stage."""
    return tuple(dict.fromkeys(name for reference in node.parts for name in _libraries(reference)))


def _libraries(reference: str) -> tuple[str, ...]:
    return _load(reference).libraries


def _load(reference: str) -> Any:
    """What a part is declared as; importing it imports no library of its own."""
    module, _, attribute = reference.partition(":")
    return getattr(import_module(module), attribute)


@cache
def hardware() -> str:
    from featherweight.system.machine import hardware_fingerprint

    return hardware_fingerprint()
