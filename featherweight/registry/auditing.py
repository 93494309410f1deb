"""The audit of a registered model: everything that is stored of it against what was signed, decided and measured."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from featherweight.errors import FeatherweightError, IntegrityError
from featherweight.measure.goals import OBJECTIVE
from featherweight.registry.attestation import ATTESTATION, attested
from featherweight.registry.evidence import with_evidence
from featherweight.registry.history import Entry
from featherweight.registry.keys import Keys
from featherweight.registry.lineage import SIGNATURE, Lineage, is_text_of, of_version, verify
from featherweight.registry.packed_text import PACKED, unpacked
from featherweight.registry.registry import DIGEST, Registry
from featherweight.registry.versions import NAME, TAG, RegisteredModel, RegisteredVersion
from featherweight.registry.witness import witnessed_fault

if TYPE_CHECKING:
    from mlflow.entities import Dataset

State = Literal["ok", "altered", "missing", "foreign", "out of step"]
UNCHECKED = "signed, but no key is trusted here"
PROVEN = ("metrics", "constraints", "objective", "evaluation", "checkpoint", "variant")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. version: '' for what belongs to the model. reason: what is wrong, or known of it."""

    model: str
    version: str
    part: str
    state: State
    reason: str = ""


def audit_model(registry: Registry, name: str, keys: Keys | None = None) -> list[Finding]:
    """Everything of a model, down to the checkpoint's files: every byte still reachable is read.

    altered: not what it was. missing: no longer there. foreign: nothing that is trusted here vouches for it. out of step: MLflow
    shows otherwise than the history has it. keys: those of this user by default. Raises GateError for an unknown model.
    """
    keys = keys or Keys.here()
    seen = registry.model(name)
    findings = [*_history(registry, seen, keys), *_entries(registry, seen, keys), *_cells(seen)]
    for version in seen.versions.values():
        content = list(_content(registry, seen, version))
        signed = any((one.part, one.state) == (SIGNATURE, "ok") for one in content)
        findings += [*_origin(seen, version, keys, signed), *content]
    return findings


def _history(registry: Registry, seen: RegisteredModel, keys: Keys) -> Iterator[Finding]:
    """What does not hold together by itself, and against what was seen from here before."""
    faults = [*seen.history.faults, *filter(None, [witnessed_fault(seen.born, seen.history, keys)])]
    for fault in faults:
        gone = "deleted" in fault or "is not there" in fault
        yield Finding(seen.model, "", "history", "missing" if gone else "altered", fault)
    if not faults:
        yield Finding(seen.model, "", "history", "ok", f"{len(seen.history.entries)} entries")
    if not seen.history.entries:
        return
    kept_in = registry.history_model(seen.model)
    if kept_in is None:
        yield Finding(
            seen.model, "", "history", "missing", "the registered model of its entries was removed: nothing can be decided"
        )
    elif NAME in kept_in.tags:
        yield Finding(seen.model, "", "history", "altered", f"{kept_in.name}, which holds its entries, is tagged as a served model")


def _entries(registry: Registry, seen: RegisteredModel, keys: Keys) -> Iterator[Finding]:
    """Entries that no trusted key signed, from the first that one did."""
    began, own, known = False, False, dict[str, int]()
    for number, (text, signature) in registry.entry_signatures(seen.model).items():
        first = known.setdefault(text, number)
        if first != number:
            yield Finding(seen.model, "", f"entry {number}", "foreign", f"entry {first} once more")
        own = own or _born(text) == seen.born
        if own and _born(text) not in (seen.born, None):  # those of a deleted model of this name come first
            yield Finding(seen.model, "", f"entry {number}", "foreign", "it is of another model")
        good = bool(signature) and keys.signed(text, signature)
        began = began or good
        if good or not keys.public or not (began or signature):
            continue
        state: State = "altered" if signature else "foreign"
        yield Finding(seen.model, "", f"entry {number}", state, "no trusted key signed it as it stands")


def _born(text: str) -> int | None:
    """When the model was created that an entry is of, None where it is not readable, which the history tells."""
    try:
        return Entry.from_json(text, 0).model
    except IntegrityError:
        return None


def _cells(seen: RegisteredModel) -> Iterator[Finding]:
    """Aliases, tags and stages that do not follow the history, or whose version is gone."""
    named = seen.tags.get(NAME, "")
    if named != seen.model and (named or any(ATTESTATION in one.tags for one in seen.versions.values())):
        way = f"it says {named}: the model was renamed in MLflow, or this altered" if named else "it was removed"
        yield Finding(seen.model, "", "tag name", "out of step" if named else "missing", way)
    standing = seen.history.standing
    for alias, number in (("champion", standing.champion), ("challenger", standing.challenger), ("previous", standing.previous)):
        if number and number not in seen.versions:
            yield Finding(seen.model, number, "version", "missing", f"the history has it as {alias}, and it was deleted in MLflow")
    moved = seen.out_of_band()
    for cell, value in [*seen.behind(), *((one, None) for one in moved if not seen.history.entries)]:
        by = f"somebody set it to {moved[cell] or 'nothing'} in MLflow, " if cell in moved else ""
        yield Finding(seen.model, "", cell.told, "out of step", f"{by}the history has it at {value or 'nothing'}")


def _origin(seen: RegisteredModel, version: RegisteredVersion, keys: Keys, files_signed: bool) -> Iterator[Finding]:
    """Whether a version was registered by somebody who is trusted here, who signed its files in the same breath."""
    twin = next((one for one in seen.versions.values() if one.digest == version.digest), version)
    signed = [int(one.version) for one in seen.versions.values() if attested(one, seen.born, keys)]
    told = (seen.model, version.version, "registration")
    if twin.version != version.version:
        yield Finding(*told, "foreign", f"the artifact of version {twin.version} once more")
    elif not keys.public or int(version.version) in signed:
        yield Finding(*told, "ok", "" if keys.public else UNCHECKED if ATTESTATION in version.tags else "no key is trusted here")
    elif ATTESTATION in version.tags:
        yield Finding(*told, "altered", "it is not what was attested of it")
    elif files_signed:
        yield Finding(*told, "missing", "its files are signed, and what attested the version was removed")
    elif signed and int(version.version) > min(signed):
        yield Finding(*told, "foreign", "no trusted key attests it")
    else:
        yield Finding(*told, "ok", "unsigned, of the time before keys")


def _content(registry: Registry, seen: RegisteredModel, version: RegisteredVersion) -> Iterator[Finding]:
    """Files, lineage, evaluation, tags and MLflow's figures of a version."""
    try:
        told = of_version(registry, seen, version)
    except FeatherweightError as error:
        gone: State = "altered" if "altered" in str(error) or "readable" in str(error) else "missing"
        yield Finding(version.model, version.version, "lineage.json", gone, str(error))
        return
    for verdict in verify(told, registry, seen):
        if verdict.part != "history":
            foreign = verdict.reason.startswith("foreign")
            yield Finding(version.model, version.version, verdict.part, "foreign" if foreign else verdict.state, verdict.reason)
    if registry.location(version) != version.source:
        yield Finding(version.model, version.version, "tag location", "altered", "MLflow takes its files from elsewhere")
    if version.shown not in (version.source, f"models:/{version.tag('model_id')}"):
        yield Finding(version.model, version.version, "source", "altered", f"MLflow's page names {version.shown}")
    yield from _tags(registry, version, told)
    yield from _runs(registry, version, told)


def _tags(registry: Registry, version: RegisteredVersion, told: Lineage) -> Iterator[Finding]:
    """Tags that tell otherwise than the lineage and the verified evaluation."""
    known = {"recipe": told.graph.recipe, "run_id": told.graph.run_id, "machine": told.graph.hardware}
    if version.run_id != told.graph.run_id:
        yield Finding(version.model, version.version, "run", "altered", f"the lineage has {told.graph.run_id}")
    if (own := re.search(r"/(m-[0-9a-f]{32})/", f"{version.source}/")) and version.tag("model_id") != own[1]:
        yield Finding(version.model, version.version, "tag model_id", "altered", f"its files are those of {own[1]}")
    try:
        proven = with_evidence(registry, version)
        known |= {name: proven.tag(name) for name in PROVEN}
    except FeatherweightError as error:
        yield Finding(version.model, version.version, "evaluation", "missing", str(error))
    with suppress(FeatherweightError):  # where the served files are not there, or not as they were, that is told of them
        known["engine"] = registry.serving(version).engine
    if (packed := version.tag(PACKED)) and not is_text_of(unpacked(packed), version.tag("lineage")):  # older versions have none
        yield Finding(version.model, version.version, f"tag {PACKED}", "altered", "the lineage tells otherwise")
    for name, value in known.items():
        if _plain(name, version.tag(name)) != _plain(name, value):
            yield Finding(version.model, version.version, f"tag {name}", "altered", "the lineage tells otherwise")


def _plain(name: str, value: str) -> Any:
    """A tag's value, to compare."""
    if name == "objective":
        return value or OBJECTIVE
    try:
        return json.loads(value) if name in ("metrics", "constraints") else value
    except (ValueError, RecursionError):
        return value


def _runs(registry: Registry, version: RegisteredVersion, told: Lineage) -> Iterator[Finding]:
    """MLflow's runs with their figures and data, stage by stage, and the logged model."""
    known = {id: registry.run(id) for id in dict.fromkeys([*(node.run_id for node in told.graph.nodes), told.graph.run_id])}
    if known[told.graph.run_id] is None:
        yield Finding(version.model, version.version, "run of the optimization", "missing", "MLflow has it no more")
    for node in told.graph.nodes:
        run = known[node.run_id]
        if run is None:
            yield Finding(version.model, version.version, f"run of {node.id}", "missing", "MLflow has it no more")
        else:
            yield from _figures(version, f"run of {node.id}", node.metrics, run.data.metrics)
    texts = {node.id: node.digest for node in told.graph.nodes if node.stage == "text"}
    shown = [one.dataset for run in known.values() if run and run.inputs for one in run.inputs.dataset_inputs]
    for name in dict.fromkeys(one.name for one in shown if one.name in texts and not _is_dataset_of(one, texts[one.name])):
        yield Finding(version.model, version.version, f"data set {name}", "altered", "the lineage has another digest")
    yield from _logged_model(registry, version, told)


def _is_dataset_of(shown: Dataset, digest: str) -> bool:
    """Whether MLflow's page names that text."""
    try:
        source = json.loads(shown.source)
    except ValueError:
        return False
    return shown.digest == digest[:DIGEST] and isinstance(source, dict) and source.get("sha256") == digest


def _logged_model(registry: Registry, version: RegisteredVersion, told: Lineage) -> Iterator[Finding]:
    shown = registry.logged_model(version.tag("model_id"))
    if shown is None:
        yield Finding(version.model, version.version, "logged model", "missing", "MLflow has it no more")
        return
    yield from _figures(version, "logged model", told.graph.metrics, {one.key: one.value for one in shown.metrics or ()})
    known = {"place": version.source, f"{TAG}digest": version.digest, f"{TAG}variant": told.graph.variant}
    found = {"place": shown.artifact_location, **shown.tags}
    if wrong := [name for name, value in known.items() if found.get(name, value) != value]:
        yield Finding(version.model, version.version, "logged model", "altered", ", ".join(wrong))


def _figures(version: RegisteredVersion, part: str, known: Mapping[str, float], shown: Mapping[str, float]) -> Iterator[Finding]:
    wrong = sorted(name for name, value in shown.items() if name in known and known[name] != value)
    if wrong:
        yield Finding(version.model, version.version, f"figures in the {part}", "altered", ", ".join(wrong))
