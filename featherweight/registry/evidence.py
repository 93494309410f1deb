"""What a promotion gate may believe of a version: figures of the evaluation that its lineage names, verified, never its tags."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from featherweight.errors import FeatherweightError, IntegrityError
from featherweight.measure.measurement import read_metrics
from featherweight.registry.attestation import attested, require_signed
from featherweight.registry.keys import Keys
from featherweight.registry.lineage import LineageGraph, LineageNode, read_graph
from featherweight.registry.model_folder import SERVED
from featherweight.registry.registry import RegisteredVersion, Registry
from featherweight.registry.versions import TAG
from featherweight.store import artifact
from featherweight.store.workspace import local_path


@dataclass(frozen=True)
class Evidence:
    """A version with verified figures, digests and goals in the place of those that its tags tell; what they were read from.

    measured: the folder of its evaluation, which lasts as long as the block.
    """

    version: RegisteredVersion
    graph: LineageGraph
    measured: Path


@contextmanager
def evidence(registry: Registry, version: RegisteredVersion, files: bool = False) -> Iterator[Evidence]:
    """What may be believed of a version.

    Its lineage has the registered digest and is of the registered artifact; the evaluation that it names has the digest that
    it names; constraints and objective are those of its recipe. files: its files are verified too, all of them where keys are
    trusted here, else the served ones. Raises IntegrityError, saying what is missing or altered.
    """
    with ExitStack() as held:
        try:
            graph = read_graph(registry, version)
            if graph.served != version.digest:
                raise IntegrityError("its lineage is of another artifact than the registered one")
            if files:
                verify_files(registry, version)
            node, folder = held.enter_context(_evaluation_folder(registry, graph))
            told = {"metrics": json.dumps(read_metrics(folder)), **_goals(graph.recipe_tree)}
        except FeatherweightError as error:
            raise IntegrityError(f"no verified evaluation of version {version.version}: {error}") from error
        root = graph.checkpoint
        told |= {"evaluation": node.parents.get("evaluation", ""), "checkpoint": root.digest if root else ""}
        told |= {"digest": graph.served, "variant": graph.variant}
        tags = {**version.tags, **{f"{TAG}{name}": value for name, value in told.items()}}
        yield Evidence(replace(version, tags=tags), graph, folder)


def with_evidence(registry: Registry, version: RegisteredVersion, files: bool = False) -> RegisteredVersion:
    """The version of its evidence alone. Raises IntegrityError."""
    with evidence(registry, version, files) as found:
        return found.version


def verify_files(registry: Registry, version: RegisteredVersion) -> None:
    """Raise IntegrityError where files of a version are not as registered: of all where keys are trusted, else of the served."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = registry.model_folder(version, Path(scratch))
        require_signed(folder, Keys.here())
        artifact.verify(folder / SERVED, version.digest)
    if Keys.here().public and not attested(version, registry.model(version.model).born, Keys.here()):
        raise IntegrityError("no trusted key attests that it is what it says")


@contextmanager
def _evaluation_folder(registry: Registry, graph: LineageGraph) -> Iterator[tuple[LineageNode, Path]]:
    """The evaluation that a lineage names, and its verified files. Raises IntegrityError where it is altered or names none."""
    node = graph.evaluation
    if node is None:
        raise IntegrityError("its lineage names none")
    with tempfile.TemporaryDirectory() as scratch:
        folder = local_path(node.uri) or registry.download(node.uri, Path(scratch))
        artifact.verify(folder, node.digest)
        yield node, folder


def _goals(tree: Mapping[str, Any]) -> dict[str, str]:
    """Constraints, objective, approval and whether a champion is asked something, of a recipe, as tags hold them."""
    if not tree:
        raise IntegrityError("its lineage holds no recipe")
    bounds = {name: bound for name, bound in (tree.get("constraints") or {}).items() if bound is not None}
    promote = tree.get("promote") or {}
    told = {"approval": str(promote.get("approval", "none")), "smoke": "asked" if promote.get("smoke", True) else "left out"}
    return {"constraints": json.dumps(bounds), "objective": str(tree.get("objective") or ""), **told}
