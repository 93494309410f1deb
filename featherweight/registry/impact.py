"""What depends on a checkpoint, on data or on a library: the registered versions whose lineage goes back to it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from featherweight.errors import FeatherweightError, one_line
from featherweight.registry.lineage import LineageGraph, LineageNode, read_graph
from featherweight.registry.registry import RegisteredVersion, Registry
from featherweight.visible import in_lines

Kind = Literal["checkpoint", "data", "library"]
STAGES = {"checkpoint": ("load", "train"), "data": ("text",)}
DEPLOYED = ("production", "staging")
READERS = 16  # lineages that are fetched at once, where a version's tags do not tell them
SHORTEST = 6  # characters of a digest


@dataclass(frozen=True)
class Affected:
    """One version that depends on what was asked for. through: the stage runs that do, with the digest or version."""

    model: str
    version: str
    variant: str
    stage: str
    aliases: tuple[str, ...]
    through: tuple[str, ...]

    @property
    def deployed(self) -> bool:
        """Whether it serves, or waits to."""
        return self.stage in DEPLOYED


@dataclass(frozen=True)
class Impact:
    """What depends on something. unknown: versions whose lineage cannot be believed, with the reason; they may depend too.

    behind: models of which MLflow shows otherwise than their histories, which say what is deployed.
    """

    kind: Kind
    wanted: str
    affected: tuple[Affected, ...]
    unknown: tuple[str, ...]
    looked_at: int
    behind: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**asdict(self), "affected": [{**asdict(one), "deployed": one.deployed} for one in self.affected]}

    def to_text(self) -> str:
        """How many, then a line each."""
        deployed = sum(one.deployed for one in self.affected)
        count = f"{len(self.affected)} of {self.looked_at} versions"
        first = f"{count} depend on {self.kind} {self.wanted}, {deployed} of them deployed"
        lines = [f"{one.stage:<11}{one.model}/{one.version}  {one.variant}  by {', '.join(one.through)}" for one in self.affected]
        behind = [f"out of step (`featherweight audit`): {', '.join(self.behind)}"] if self.behind else []
        return in_lines([first, *lines, *(f"unknown    {one}" for one in self.unknown), *behind])


def impact(registry: Registry, kind: Kind, wanted: str) -> Impact:
    """The versions of all models that go back to `wanted`: a digest or its first characters, a source, or LIBRARY[==VERSION]."""
    models = registry.all_models()
    versions = [version for model in models for version in model.versions.values()]
    with ThreadPoolExecutor(READERS) as pool:
        graphs = list(pool.map(lambda version: _graph(registry, version), versions))
    told = [(version, graph) for version, graph in zip(versions, graphs, strict=True)]
    found = [_affected(version, kind, wanted, graph) for version, graph in told if isinstance(graph, LineageGraph)]
    affected = sorted((one for one in found if one.through), key=lambda one: (not one.deployed, one.model, int(one.version)))
    unknown = (f"{version.model}/{version.version}: {reason}" for version, reason in told if isinstance(reason, str))
    behind = tuple(model.model for model in models if model.behind() or model.out_of_band())
    return Impact(kind, wanted, tuple(affected), tuple(unknown), len(versions), behind)


def _graph(registry: Registry, version: RegisteredVersion) -> LineageGraph | str:
    """The lineage of a version, or why it cannot be believed."""
    try:
        return read_graph(registry, version, told=True)
    except FeatherweightError as error:
        return one_line(error)


def _affected(version: RegisteredVersion, kind: Kind, wanted: str, graph: LineageGraph) -> Affected:
    through = _libraries(graph, wanted) if kind == "library" else _sources(graph, STAGES[kind], wanted)
    names = tuple(dict.fromkeys(through))
    return Affected(version.model, version.version, version.variant, version.stage, version.aliases, names)


def _sources(graph: LineageGraph, stages: tuple[str, ...], wanted: str) -> Iterator[str]:
    """The stage runs that read a source, or made what has the digest."""
    for node in graph.nodes:
        if node.stage in stages and (_is_digest(node, wanted) or _is_source(node, wanted)):
            yield f"{node.id} {node.digest[:12]}"


def _is_digest(node: LineageNode, wanted: str) -> bool:
    plain = wanted.removeprefix("sha256:")
    return len(plain) >= SHORTEST and node.digest.startswith(plain)


def _is_source(node: LineageNode, wanted: str) -> bool:
    source = node.source
    if not source or "://" in wanted:
        return source.rstrip("/") == wanted.rstrip("/")
    return source == wanted or Path(source).expanduser().absolute() == Path(wanted).expanduser().absolute()


def _libraries(graph: LineageGraph, wanted: str) -> Iterator[str]:
    """The versions of a library that shaped its stage runs."""
    name, _, version = wanted.partition("==")
    for node in graph.nodes:
        for library, installed in node.environment.items():
            if name in (library, library.rpartition("/")[2]) and version in ("", installed):
                yield f"{library} {installed}"
