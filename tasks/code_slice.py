"""The code that a function of ours runs: its definition and those that it names, one after another, wherever they stand.

An edit elsewhere in a module, a comment, a docstring, an annotation or the words of an error change no result and are not seen.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from featherweight.store.artifact import content_digest
from featherweight.system.syntax import syntax_of

OURS = frozenset({"featherweight", "tasks"})
INERT = frozenset(
    {
        "featherweight.catalog",
        "featherweight.errors",
        "featherweight.progress",
        "featherweight.system.lighter_imports",
        "featherweight.system.transformers_import",
        "tasks.stage",
        "tasks.stages",
    }
)
"""Modules whose code shapes no result: they tell and hand on, or leave an import out.

What a catalog loads by name is a part of the node that names it."""
SILENT = re.compile(r"refus.*|.*refusal|.*operations|offers")
"""Names of definitions that only refuse, or say what something costs or is to be expected of: failures are never cached."""
REFERENCE = re.compile(r"[A-Za-z_]\w*(\.\w+)+(:[A-Za-z_]\w*)?")
"""What a string looks like that names a module, or something in one, to be loaded or run later."""
WHOLE = "*"
EFFECTS = ""
"""The name, in a module's table, of what its import runs beside binding names."""
Place = tuple[str, str]
"""A module and a name in it, or `WHOLE`."""


@dataclass
class Module:
    """A module's definitions by name, each the statements that bind it; what it imports, by the name that it is known as."""

    name: str
    is_package: bool
    definitions: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imports: dict[str, list[Place]] = field(default_factory=dict)

    def follows(self, other: str) -> bool:
        """Whether another module is this project's, or of this one's own package."""
        return other.partition(".")[0] in OURS | {self.name.partition(".")[0]}


@dataclass(frozen=True)
class Definition:
    """What a definition says, cleaned of what shapes no result, and the places that it names."""

    text: str
    named: frozenset[Place]


def slice_of(reference: str) -> dict[str, str]:
    """'module:attribute' -> the cleaned text of every definition that it reaches, by its place.

    Followed are definitions of this project, and of the reference's own package.
    """
    module, _, attribute = reference.partition(":")
    found: dict[Place, str] = {}
    pending = [(module, attribute or WHOLE)]
    while pending:
        place = pending.pop()
        if place not in found and place[0] not in INERT:
            found[place], named = _look_up(place)
            pending += named
    return {":".join(place): text for place, text in found.items() if text}


def _look_up(place: Place) -> tuple[str, Iterable[Place]]:
    """The text at a place, empty where the name comes from elsewhere, and the places to go to from there."""
    module, name = place
    table = read_module(module)
    if table is None:
        return "", ()
    if name == WHOLE:
        return "", [(module, one) for one in (*table.definitions, *table.imports)]
    if name in table.definitions:
        one = definition(module, name)
        return one.text, one.named | {(module, EFFECTS)} - {place}
    if name in table.imports:
        return "", table.imports[name]
    if name == EFFECTS:
        return "", ()
    if file_of(f"{module}.{name}"):
        return "", ((f"{module}.{name}", EFFECTS),)
    return "", ((module, WHOLE),)


@cache
def state_of_files() -> str | None:
    """What any edit of this project's files changes, and another Python; None where its files are not plain ones."""
    roots = [root_of(package) for package in sorted(OURS)]
    files = [path for root in roots if root for path in sorted(root.parent.rglob("*.py"))]
    told = [(str(path), (status := path.stat()).st_size, status.st_mtime_ns) for path in files]
    return content_digest([sys.version, told]) if all(roots) else None


@cache
def read_module(name: str) -> Module | None:
    """The table of a module; None for one that has no source."""
    path = file_of(name)
    if path is None:
        return None
    module = Module(name, path.name == "__init__.py")
    for statement in syntax_of(path.read_text(encoding="utf-8")).body:
        _enter(module, statement)
    return module


@cache
def file_of(module: str) -> Path | None:
    """The source of a module; nothing is imported for it."""
    top, *rest = module.split(".")
    root = root_of(top)
    if root is None or not rest:
        return root
    folder = root.parent.joinpath(*rest)
    return next((path for path in (folder.with_suffix(".py"), folder / "__init__.py") if path.is_file()), None)


@cache
def root_of(package: str) -> Path | None:
    """The file of a top-level package or module; None where it has none in Python."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _enter(module: Module, statement: ast.stmt) -> None:
    """Enter a statement of a module's body under every name that it binds."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        for name, places in _imported(statement, module).items():
            module.imports.setdefault(name, []).extend(places)
    elif isinstance(statement, ast.If) and _is_type_checking(statement.test):
        for other in statement.orelse:
            _enter(module, other)
    elif not _is_text(statement):
        for name in bound_names(statement) or (EFFECTS,):
            module.definitions.setdefault(name, []).append(statement)


def _imported(statement: ast.Import | ast.ImportFrom, module: Module) -> dict[str, list[Place]]:
    """The places that an import binds, by the name that it binds each to."""
    if isinstance(statement, ast.Import):
        named = [(one.asname, one.name) if one.asname else (one.name.partition(".")[0],) * 2 for one in statement.names]
        return {name: [(target, EFFECTS)] for name, target in named if module.follows(target)}
    source = _source(statement, module)
    if not module.follows(source):
        return {}
    if any(alias.name == "*" for alias in statement.names):
        other = read_module(source)
        return {name: [(source, name)] for name in (*other.definitions, *other.imports)} if other else {}
    return {alias.asname or alias.name: [(source, alias.name)] for alias in statement.names}


def _source(statement: ast.ImportFrom, module: Module) -> str:
    """The absolute name of the module that names are imported from."""
    if not statement.level:
        return statement.module or ""
    parts = module.name.split(".")
    parts = parts[: len(parts) - statement.level + module.is_package]
    return ".".join([*parts, *([statement.module] if statement.module else [])])


def bound_names(statement: ast.stmt) -> set[str]:
    """The names that a statement of a module's body binds."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    bound = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    if isinstance(statement, ast.If | ast.Try | ast.With | ast.For | ast.While):
        for node in ast.walk(statement):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                bound.add(node.name)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                bound |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    return bound


def _is_type_checking(test: ast.expr) -> bool:
    return (test.id if isinstance(test, ast.Name) else test.attr if isinstance(test, ast.Attribute) else "") == "TYPE_CHECKING"


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and isinstance(statement.value.value, str)


@cache
def definition(module: str, name: str) -> Definition:
    table = read_module(module)
    assert table is not None
    if SILENT.fullmatch(name):
        return Definition("", frozenset())
    statements = table.definitions[name]
    if any(_is_catalog(one) for one in statements):
        return Definition(name, frozenset())
    cleaned = [found for one in statements if (found := _Cleaner().visit(one)) is not None]
    named = _Names(table)
    for one in cleaned:
        named.visit(one)
    return Definition("\n".join(ast.dump(one) for one in cleaned), frozenset(named.places - {(module, name)}))


def _is_catalog(statement: ast.stmt) -> bool:
    """Whether it makes a Catalog: a node names as its parts what it takes of one."""
    value = getattr(statement, "value", None)
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "Catalog"


class _Cleaner(ast.NodeTransformer):
    """Takes out what shapes no result: docstrings, annotations of functions and locals, words of errors, what only refuses."""

    def __init__(self) -> None:
        self._in_class = False

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> ast.AST | None:
        if SILENT.fullmatch(node.name):
            return None
        node.returns = None
        was, self._in_class = self._in_class, False
        self.generic_visit(node)
        self._in_class = was
        return node

    visit_FunctionDef = _function
    visit_AsyncFunctionDef = _function

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        was, self._in_class = self._in_class, True
        self.generic_visit(node)
        self._in_class = was
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        return None if _is_text(node) else self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        """An annotation of a class's field is code: dataclasses and pydantic read it."""
        if self._in_class:
            return self.generic_visit(node)
        if node.value is None:
            return None
        return self.generic_visit(ast.Assign([node.target], node.value))

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        """Which error it is can be code's business; what it says is not."""
        return ast.Raise(node.exc.func if isinstance(node.exc, ast.Call) else node.exc, None)


class _Names(ast.NodeVisitor):
    """Gathers the places that a cleaned definition names, its own local names aside."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.places: set[Place] = set()
        self._scopes: list[dict[str, list[Place]]] = []

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self._use(node.id, ())

    def visit_Attribute(self, node: ast.Attribute) -> None:
        chain: list[str] = []
        base: ast.expr = node
        while isinstance(base, ast.Attribute):
            chain.insert(0, base.attr)
            base = base.value
        if isinstance(base, ast.Name):
            self._use(base.id, tuple(chain))
        else:
            self.visit(base)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and REFERENCE.fullmatch(node.value):
            module, _, attribute = node.value.partition(":")
            if self.module.follows(module) and file_of(module):
                self.places.add((module, attribute or WHOLE))

    def visit_Import(self, node: ast.Import) -> None:
        self._import(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self._import(node)

    def _import(self, node: ast.Import | ast.ImportFrom) -> None:
        """A name imported in a function counts where it is used, as one imported in the module does."""
        if not self._scopes:
            for places in _imported(node, self.module).values():
                self.places.update(places)

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        for one in (*getattr(node, "decorator_list", ()), *node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.visit(one)
        self._scopes.append(_locals(node, self.module))
        for one in node.body if isinstance(node.body, list) else [node.body]:
            self.visit(one)
        self._scopes.pop()

    visit_FunctionDef = _function
    visit_AsyncFunctionDef = _function
    visit_Lambda = _function

    def _comprehension(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> None:
        targets = [name for one in node.generators for name in ast.walk(one.target) if isinstance(name, ast.Name)]
        self.visit(node.generators[0].iter)
        self._scopes.append({name.id: [] for name in targets})
        self.generic_visit(node)
        self._scopes.pop()

    visit_ListComp = _comprehension
    visit_SetComp = _comprehension
    visit_GeneratorExp = _comprehension
    visit_DictComp = _comprehension

    def _use(self, name: str, chain: tuple[str, ...]) -> None:
        """Enter the place that `name`, followed by these attributes, stands for."""
        for scope in reversed(self._scopes):
            if name in scope:
                for place in scope[name]:
                    self.places.update(_along(place, chain))
                return
        module = self.module
        if name in module.imports:
            for place in module.imports[name]:
                self.places.update(_along(place, chain))
        elif name in module.definitions:
            self.places.add((module.name, name))


def _along(place: Place, chain: tuple[str, ...]) -> Iterator[Place]:
    """The places behind an imported name and the attributes asked of it, as far as these are modules."""
    module, name = place
    if name != EFFECTS:
        table = read_module(module)
        inside = table is not None and (name in table.definitions or name in table.imports)
        if inside or file_of(f"{module}.{name}") is None:
            yield place
            return
        module = f"{module}.{name}"
    yield module, EFFECTS
    if not chain:
        yield module, WHOLE  # handed on as a whole
    elif (table := read_module(module)) is not None and chain[0] not in (*table.definitions, *table.imports):
        yield from _along((module, chain[0]), chain[1:])
    else:
        yield module, chain[0]


def _locals(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda, module: Module) -> dict[str, list[Place]]:
    """The names local to a function; those that it imports with the places that they stand for."""
    arguments = node.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    found: dict[str, list[Place]] = {one.arg: [] for one in every if one is not None}
    outer: set[str] = set()
    pending: list[ast.AST] = list(node.body) if isinstance(node.body, list) else []
    while pending:
        one = pending.pop()
        if isinstance(one, ast.Import | ast.ImportFrom):
            for name, places in _imported(one, module).items():
                found.setdefault(name, []).extend(places)
        elif isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.setdefault(one.name, [])
        elif isinstance(one, ast.Global | ast.Nonlocal):
            outer.update(one.names)
        elif isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store):
            found.setdefault(one.id, [])
        elif not isinstance(one, ast.Lambda | ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp):
            if isinstance(one, ast.ExceptHandler) and one.name:
                found.setdefault(one.name, [])
            pending += ast.iter_child_nodes(one)
    return {name: places for name, places in found.items() if name not in outer}
