"""The ladder: imports go down only, in no circle, and take nothing private; the README shows the folders."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import ROOT

LAYERS = ("featherweight", "tasks", "flows")
FILES = {path: ast.parse(path.read_text()) for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path) for path in FILES}


def program(name: str) -> str:
    path = Path(sys.executable).parent / name
    if not path.exists():
        pytest.skip(f"{name} is not installed; run `make setup`")
    return str(path)


def test_imports_go_down_only():
    done = subprocess.run([program("lint-imports"), "--no-logo", "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kept, 0 broken" in done.stdout


@pytest.mark.parametrize("layer", LAYERS)
def test_nothing_that_is_shipped_imports_the_tests_or_the_benchmarks(layer):
    trees = {path: tree for path, tree in FILES.items() if path.is_relative_to(ROOT / layer)}
    assert trees, f"{layer} holds no modules"
    wrong = {
        module_name(path)
        for path, tree in trees.items()
        for name in imports(tree)
        if name.partition(".")[0] in ("tests", "benchmarks", "conformance")
    }
    assert not wrong


def imports(tree: ast.Module) -> Iterator[str]:
    """The dotted names of the modules that a file imports, or takes names from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_names(tree: ast.Module) -> Iterator[str]:
    """What a file takes of our other modules that is private to them: `from m import _x`, or `m._x`."""
    ours: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in LAYERS:
            yield from (f"{node.module}.{alias.name}" for alias in node.names if private(alias.name))
            ours |= {alias.asname or alias.name for alias in node.names if f"{node.module}.{alias.name}" in MODULES}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours and private(node.attr):
            yield f"{node.value.id}.{node.attr}"


def test_a_private_name_is_noticed():
    tree = ast.parse("from featherweight.checkpoint import s3\nfrom tasks.stage import _x, y\ns3._get(), s3.get(), y._z")
    assert list(private_names(tree)) == ["tasks.stage._x", "s3._get"]


def test_no_module_uses_what_is_private_to_another():
    wrong = {module_name(path): found for path, tree in FILES.items() if (found := sorted(private_names(tree)))}
    assert not wrong


def first_needs(path: Path) -> set[str]:
    """Our modules that are imported while the module at `path` is, the packages around them included, but its own not."""
    name = module_name(path)
    wanted: set[str] = set()
    for node in at_import(FILES[path].body):
        if isinstance(node, ast.Import):
            wanted |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            named = {f"{node.module}.{alias.name}" for alias in node.names}
            wanted |= (named & MODULES) | ({node.module} if named - MODULES else set())
    around = {".".join(parts[:depth]) for one in wanted for parts in [one.split(".")] for depth in range(1, len(parts))}
    return (wanted | {package for package in around if not f"{name}.".startswith(f"{package}.")}) & MODULES


def at_import(nodes: list[ast.stmt]) -> Iterator[ast.AST]:
    """The statements that run when a module is imported: those of no function, nor for type checkers only."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        ):
            continue
        yield node
        yield from at_import([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)])


def test_there_are_no_circles():
    """So whichever module is imported first finds all that it needs."""
    order = graphlib.TopologicalSorter({module_name(path): first_needs(path) for path in FILES})
    assert len(list(order.static_order())) == len(FILES)


def test_a_circle_would_be_noticed():
    tree = ast.parse("import a\nif TYPE_CHECKING:\n    import b\ntry:\n    import c\nfinally:\n    pass\ndef f():\n    import d")
    assert [alias.name for node in at_import(tree.body) if isinstance(node, ast.Import) for alias in node.names] == ["a", "c"]


def readme_tree() -> set[str]:
    """The folders that the README's tree names, one a line, as paths: indentation says which lies in which."""
    text = (ROOT / "README.md").read_text()
    block = next(block for block in re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE) if "featherweight/ " in block)
    above: list[tuple[int, str]] = []
    found = set()
    for indent, name in re.findall(r"^( *)([\w-]+)/ ", block, re.MULTILINE):
        above = [(depth, path) for depth, path in above if depth < len(indent)]
        above.append((len(indent), f"{above[-1][1]}/{name}" if above else name))
        found.add(above[-1][1])
    return found


def test_the_readmes_tree_names_every_folder():
    """And no other: a folder holds modules, or what belongs to them (templates)."""
    here = {path.parent.relative_to(ROOT).as_posix() for path in FILES}
    shown = readme_tree()
    assert here <= shown
    assert not {name for name in shown if not (ROOT / name).is_dir()}
