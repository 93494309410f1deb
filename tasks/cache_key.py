"""What a node's cache key knows: the code and the libraries that can change its result."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from featherweight.store.artifact import content_digest

PACKAGES = ("featherweight", "tasks")


# Modules whose text does not shape a stage's result: specs enter the key by value.
INERT = {"featherweight.recipe", "featherweight.errors", "featherweight.progress", "tasks.stage"}


def library_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Installed versions; a library that is not installed is said to be absent."""
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


@cache
def code_digest(module: str) -> str:
    """Digest of the code that a stage's module reaches inside this project, comments and layout aside."""
    seen: dict[str, str] = {}
    pending = [module]
    while pending:
        name = pending.pop()
        if name in seen or name in INERT:
            continue
        tree = _syntax(name)
        if tree is None:
            continue
        seen[name] = ast.dump(tree)
        pending += _imports(tree)
    return content_digest(seen)


def _syntax(module: str) -> ast.Module | None:
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return None
    return ast.parse(Path(spec.origin).read_text())


def _imports(tree: ast.Module) -> Iterator[str]:
    """Names of this project's modules that a syntax tree imports, wherever the import stands."""
    for item in ast.walk(tree):
        if isinstance(item, ast.ImportFrom) and item.module and item.module.split(".")[0] in PACKAGES:
            yield item.module
            for alias in item.names:
                if (Path(__file__).parents[1] / item.module.replace(".", "/") / f"{alias.name}.py").exists():
                    yield f"{item.module}.{alias.name}"
        elif isinstance(item, ast.Import):
            yield from (alias.name for alias in item.names if alias.name.split(".")[0] in PACKAGES)


@cache
def hardware() -> str:
    from featherweight.system.machine import hardware_fingerprint

    return hardware_fingerprint()
