"""Lineage: where a variant comes from, told and checked from its registered version alone."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import TypeAdapter

from featherweight import __version__
from featherweight.errors import FeatherweightError, IntegrityError, one_line
from featherweight.registry.attestation import folder_faults
from featherweight.registry.history import Transition
from featherweight.registry.keys import Keys
from featherweight.registry.model_folder import SERVED
from featherweight.registry.packed_text import PACKED, unpacked
from featherweight.store import artifact
from featherweight.store.artifact import ArtifactRef, Manifest
from featherweight.store.workspace import local_path
from featherweight.system import toolchains
from featherweight.system.shipped import in_checkout
from featherweight.visible import in_lines

if TYPE_CHECKING:
    from featherweight.registry.registry import Registry
    from featherweight.registry.versions import RegisteredModel, RegisteredVersion

State = Literal["ok", "missing", "altered"]
SIGNATURE = "signature"
VERSION = 2
TOLD = ("stage", "spec", "parents", "metrics", "seed", "environment", "machine", "started", "finished")


@dataclass(frozen=True)
class LineageNode:
    """One stage run. `parents` maps the names of its inputs to the digests of the artifacts that they were."""

    id: str
    stage: str
    spec: Mapping[str, Any]
    digest: str
    uri: str
    run_id: str
    parents: Mapping[str, str]
    metrics: Mapping[str, float]
    environment: Mapping[str, str]
    machine: Mapping[str, Any]
    started: str
    finished: str
    seed: int = 0

    @property
    def source(self) -> str:
        """Where a checkpoint or a text was read from, '' for what was made here."""
        return source_of(self.spec)

    @classmethod
    def of(cls, ref: ArtifactRef, manifest: Manifest) -> LineageNode:
        """The node of an artifact and its manifest."""
        told = {name: getattr(manifest, name) for name in ("stage", "spec", "digest", "parents", "metrics", "seed")}
        where = {name: getattr(manifest, name) for name in ("environment", "machine", "started", "finished")}
        return cls(id=ref.node, uri=ref.uri, run_id=ref.run_id, **told, **where)


@dataclass(frozen=True)
class LineageGraph:
    """What `lineage.json` stores: the variant, the run that made it, and every stage run that it goes back to.

    served: digest of the served artifact. recipe: the recipe's text. commit: of Featherweight's own code.
    nodes: parents before children, the decision last. reason: why it won, empty before version 2.
    """

    variant: str
    served: str
    recipe: str
    commit: str
    run_id: str
    flow_run_id: str
    metrics: Mapping[str, float]
    nodes: tuple[LineageNode, ...]
    version: int = VERSION
    reason: str = ""

    def to_json(self) -> str:
        """The stored form, the same text for the same graph."""
        return json.dumps(asdict(self), indent=1, sort_keys=True, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> LineageGraph:
        """Read the stored form. Raises IntegrityError where it is none, or of a later version of Featherweight."""
        try:
            fields = json.loads(text)
            if fields["version"] > VERSION:
                raise IntegrityError(f"lineage of version {fields['version']}; this Featherweight reads up to {VERSION}")
            _adapter().validate_json(text, strict=True)  # which would make floats of whole numbers: its result is not used
            fields["nodes"] = tuple(LineageNode(**node) for node in fields["nodes"])
            return cls(**fields)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise IntegrityError(f"not a readable lineage: {one_line(error, 200)}") from error

    @property
    def checkpoint(self) -> LineageNode | None:
        """The stage run that the weights start from: what was loaded or trained."""
        return next((node for node in self.nodes if node.stage in ("load", "train")), None)

    @property
    def evaluation(self) -> LineageNode | None:
        """The stage run that measured the served artifact."""
        return next((one for one in self.nodes if one.stage == "evaluate" and one.parents.get("served") == self.served), None)

    @property
    def recipe_tree(self) -> Mapping[str, Any]:
        """The recipe as it was written, empty where there is none. Raises IntegrityError where it is not readable."""
        try:
            tree = yaml.safe_load(self.recipe)
        except (yaml.YAMLError, RecursionError) as error:
            raise IntegrityError("the recipe in its lineage is not readable") from error
        return tree if isinstance(tree, Mapping) else {}

    @property
    def data(self) -> dict[str, str]:
        """Digests of the texts that went in, by node."""
        return {node.id: node.digest for node in self.nodes if node.stage == "text"}

    @property
    def hardware(self) -> str:
        """The machine of the last stage run, '' where it tells of none."""
        return str(self.nodes[-1].machine.get("hardware", "")) if self.nodes else ""

    def parents(self, node: LineageNode) -> list[tuple[str, LineageNode]]:
        """(input name, parent) of a node; content-addressed, so an equal artifact is the same parent."""
        by_digest = {one.digest: one for one in reversed(self.nodes)}
        return [(name, by_digest[digest]) for name, digest in node.parents.items() if digest in by_digest]


@cache
def _adapter() -> TypeAdapter[LineageGraph]:
    """What judges a stored graph: made once, since that takes longer than to judge one."""
    return TypeAdapter(LineageGraph)


@dataclass(frozen=True)
class Lineage:
    """A registered version's whole story: the stored graph, and what the registry knows since."""

    model: str
    version: str
    stage: str
    aliases: tuple[str, ...]
    engine: str
    digest: str
    graph: LineageGraph
    history: tuple[Transition, ...] = field(default=())

    def to_json(self) -> str:
        """Everything, for a program to read."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)

    def to_text(self) -> str:
        """Everything that fits a terminal: facts, the tree of stage runs, the numbers, the history."""
        known = [f"{name:<12} {value}" for name, value in facts(self).items()]
        return in_lines([*known, "", *tree_lines(self.graph), "", *number_lines(self.graph), "", *history_lines(self.history)])


@dataclass(frozen=True)
class Verdict:
    """Whether one part of a lineage still is what it was: 'ok', 'missing' (no longer reachable) or 'altered'."""

    part: str
    state: State
    reason: str = ""


def source_of(spec: Mapping[str, Any]) -> str:
    """The source that a stage's spec names: its own, or that of its data."""
    data = spec.get("data")
    return str(spec.get("source") or (data.get("source") if isinstance(data, Mapping) else "") or "")


def build(
    artifacts: Iterable[tuple[ArtifactRef, Manifest]],
    served: str,
    *,
    variant: str,
    recipe: str,
    run_id: str,
    flow_run_id: str = "",
    commit: str | None = None,
    measured: str | None = None,
    decided: str | None = None,
    reason: str = "",
    metrics: Mapping[str, float] | None = None,
) -> LineageGraph:
    """The lineage of the artifact with digest `served`: it and all that it goes back to, among `artifacts`.

    measured: digest of the variant's measurement, which brings in the evaluation text and the baseline. decided: digest of
    the decision, whose other parents, what the variant was compared with, are named by their digests only. reason: why it won.
    commit: of the code, asked of git if not given. Raises IntegrityError where a parent is not among `artifacts`.
    """
    nodes: dict[str, LineageNode] = {}
    for ref, manifest in artifacts:
        nodes.setdefault(manifest.digest, LineageNode.of(ref, manifest))
    order: dict[str, LineageNode] = {}
    for digest in filter(None, (served, measured)):
        _collect(digest, nodes, order, set())
    if decided is not None:
        order[decided] = nodes[decided]
    return LineageGraph(
        variant=variant,
        served=served,
        recipe=recipe,
        commit=code_commit() if commit is None else commit,
        run_id=run_id,
        flow_run_id=flow_run_id,
        metrics=dict(metrics or {}),
        nodes=tuple(order.values()),
        reason=reason,
    )


def _collect(digest: str, nodes: Mapping[str, LineageNode], order: dict[str, LineageNode], above: set[str]) -> None:
    """Add a node to `order` behind its parents; a stage that changed nothing is its own parent by digest, and stops here."""
    if digest in order or digest in above:
        return
    if digest not in nodes:
        raise IntegrityError(f"lineage is incomplete: no artifact with digest {digest[:12]} among the run's artifacts")
    for parent in nodes[digest].parents.values():
        _collect(parent, nodes, order, above | {digest})
    order[digest] = nodes[digest]


def code_commit() -> str:
    """Commit of the running code, '+' behind it where the working tree differs, 'unknown' outside a git checkout.

    Of an installed wheel its version: a checkout around its environment is somebody else's.
    """
    if not in_checkout():
        return f"featherweight {__version__}"
    here = Path(__file__).parent
    ask = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    try:
        answer = subprocess.run(ask, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.strip()


def otherwise(graph: LineageGraph) -> dict[str, str]:
    """Code and libraries of a lineage that are others here, 'was → is'."""
    told = {name: version for node in graph.nodes for name, version in node.environment.items()}
    pairs = {"code": (graph.commit, code_commit()), **{name: (version, _installed(name)) for name, version in told.items()}}
    return {name: f"{was} → {now}" for name, (was, now) in pairs.items() if was != now}


def _installed(name: str) -> str:
    toolchain, _, library = name.rpartition("/")
    if toolchain:
        return toolchains.version_of(toolchain, library)
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def from_registry(registry: Registry, model: str, ref: str = "champion") -> Lineage:
    """The lineage of a version (number or alias) from the registry alone.

    Raises GateError for an unknown model, version or alias, IntegrityError where the stored lineage was altered.
    """
    seen = registry.model(model)
    return of_version(registry, seen, seen.pick(ref))


def of_version(registry: Registry, seen: RegisteredModel, version: RegisteredVersion) -> Lineage:
    """The same of a version of a model that was looked at. Raises IntegrityError where the stored lineage was altered."""
    return _lineage(seen, version, read_graph(registry, version))


def read_graph(registry: Registry, version: RegisteredVersion, told: bool = False) -> LineageGraph:
    """The graph that was registered with a version. Raises IntegrityError where it was altered since, or is another artifact's.

    told: take its text from the version's tag, where that has the registered digest, which asks for nothing more.
    """
    digest = version.tag("lineage")
    text = unpacked(version.tag(PACKED)) if told else ""
    if not is_text_of(text, digest):
        text = registry.lineage_json(version)
    if not is_text_of(text, digest):
        raise IntegrityError(f"lineage.json of {version.uri} was altered after it was registered")
    return LineageGraph.from_json(text)


def is_text_of(text: str, digest: str) -> bool:
    """Whether a lineage's text has the registered digest."""
    return hashlib.sha256(text.encode()).hexdigest() == digest


def _lineage(seen: RegisteredModel, version: RegisteredVersion, graph: LineageGraph) -> Lineage:
    history = tuple(entry for entry in seen.history.transitions if entry.version == version.version)
    return Lineage(
        model=version.model,
        version=version.version,
        stage=version.stage,
        aliases=version.aliases,
        engine=version.tag("engine"),
        digest=version.digest,
        graph=graph,
        history=history,
    )


def verify(lineage: Lineage, registry: Registry, seen: RegisteredModel | None = None) -> list[Verdict]:
    """Recompute the digest of every artifact still reachable, of the registered files and of the history.

    Reads every byte of them: seconds per gigabyte on a local store, a download from a remote one. seen: the model, where it was
    looked at already.
    """
    seen = seen or registry.model(lineage.model)
    version = seen.pick(lineage.version)
    with tempfile.TemporaryDirectory() as scratch:
        verdicts = _registered_files(version, registry, Path(scratch) / "registered")
        if lineage.graph.served != lineage.digest:
            verdicts.append(Verdict("served digest", "altered", "the registered digest is not the lineage's"))
        for number, node in enumerate(lineage.graph.nodes):
            folder = Path(scratch) / str(number)
            verdicts.append(_judge(node.id, node.digest, lambda n=node, f=folder: _fetch(registry, n.uri, f), node))
    faults = seen.history.faults
    return [*verdicts, *(Verdict("history", "altered", fault) for fault in faults)] + ([] if faults else [Verdict("history", "ok")])


def _registered_files(version: RegisteredVersion, registry: Registry, scratch: Path) -> list[Verdict]:
    """The served files against their digest; where a key is trusted here, all of the registered folder, which is fetched once."""
    part, keys = "registered files", Keys.here()
    if not keys.public:
        return [_judge(part, version.digest, lambda: registry.served_folder(version, scratch))]
    try:
        folder = registry.model_folder(version, scratch)
    except FeatherweightError as error:
        return [Verdict(part, "missing", str(error))]
    return [_judge(part, version.digest, lambda: folder / SERVED), *_signed_files(folder, keys)]


def _signed_files(folder: Path, keys: Keys) -> list[Verdict]:
    """Each file of a registered folder that is not what was signed."""
    faults = folder_faults(folder, keys)
    if not faults:
        return [Verdict(SIGNATURE, "ok")]
    return [Verdict(f"file {name}", "missing" if why.startswith("missing") else "altered", why) for name, why in faults.items()]


def _judge(part: str, digest: str, fetch: Any, node: LineageNode | None = None) -> Verdict:
    """Fetch an artifact and recompute its digest; what else its manifest tells has to be what the node tells."""
    try:
        folder = fetch()
        if not Path(folder).is_dir():
            return Verdict(part, "missing", f"{folder} is not there")
    except FeatherweightError as error:
        return Verdict(part, "missing", str(error))
    try:
        manifest = artifact.verify(Path(folder), digest)
    except IntegrityError as error:
        return Verdict(part, "altered", str(error))
    told = [name for name in TOLD if node is not None and getattr(manifest, name) != getattr(node, name)]
    return Verdict(part, "altered", f"its manifest tells otherwise: {', '.join(told)}") if told else Verdict(part, "ok")


def _fetch(registry: Registry, uri: str, folder: Path) -> Path:
    return local_path(uri) or registry.download(uri, folder)


def facts(lineage: Lineage) -> dict[str, str]:
    """What a version is, by the name of each fact."""
    graph, root = lineage.graph, lineage.graph.checkpoint
    machine = next((node.machine for node in reversed(graph.nodes) if node.machine), {})
    named = f" ({', '.join(lineage.aliases)})" if lineage.aliases else ""
    return {
        "model": f"{lineage.model} version {lineage.version}{named}, {lineage.stage}",
        "variant": f"{graph.variant} on {lineage.engine}",
        "won by": graph.reason or "unknown",
        "digest": lineage.digest,
        "checkpoint": f"{root.digest[:12]} {_source(root)}" if root else "unknown",
        "data": ", ".join(f"{name} {digest[:12]}" for name, digest in graph.data.items()) or "none",
        "recipe": f"sha256 {hashlib.sha256(graph.recipe.encode()).hexdigest()[:12]}, {len(graph.recipe.splitlines())} lines",
        "code": graph.commit,
        "libraries": ", ".join(_libraries(graph)) or "unknown",
        "machine": ", ".join(f"{name} {value}" for name, value in machine.items()) or "unknown",
        "MLflow run": graph.run_id,
        "Prefect run": graph.flow_run_id or "none",
    }


def _libraries(graph: LineageGraph) -> list[str]:
    """All that shaped the result, whichever stage they belong to; what two stages had in two versions stands there in both."""
    return sorted({f"{name} {version}" for node in graph.nodes for name, version in node.environment.items()})


def _source(root: LineageNode) -> str:
    return f"from {root.source}" if root.source else f"trained here ({root.stage})"


def tree_lines(graph: LineageGraph) -> list[str]:
    """The served artifact at the top, what it was made from below it; a node that stands there already is not unfolded again."""
    lines: list[str] = []
    shown: set[str] = set()

    def show(node: LineageNode, name: str, lead: str, last: bool, top: bool) -> None:
        branch = "" if top else ("└─ " if last else "├─ ")
        again = node.id in shown
        label = f"{name}: " if name else ""
        lines.append(f"{lead}{branch}{label}{node.stage} {node.id} [{node.digest[:12]}]{' ↑' if again else ''}")
        if again:
            return
        shown.add(node.id)
        above = graph.parents(node)
        for place, (child_name, child) in enumerate(above):
            deeper = lead if top else lead + ("   " if last else "│  ")
            show(child, child_name, deeper, place == len(above) - 1, False)

    tops = [node for node in graph.nodes if node.digest == graph.served] + [
        node for node in graph.nodes[-1:] if node.digest != graph.served
    ]
    for node in tops:
        show(node, "", "", True, True)
    return lines


def number_lines(graph: LineageGraph) -> list[str]:
    """The figures, a line each."""
    return [f"{name:<28} {value:.6g}" for name, value in sorted(graph.metrics.items())]


def history_lines(history: Iterable[Transition]) -> list[str]:
    """The transitions, a line each and one for each gate."""
    lines: list[str] = []
    for entry in history:
        lines.append(f"{entry.when[:19]}Z  {entry.source} → {entry.target}  by {entry.who}: {entry.why}")
        lines += [f"    {'✓' if gate.passed else '✗'} {gate.gate}: {gate.reason}" for gate in entry.gates]
    return lines or ["never promoted"]
