"""The machine-learning bill of materials of a registered version: CycloneDX 1.6, from its verified lineage."""

from __future__ import annotations

import importlib.metadata
import json
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from featherweight.errors import IntegrityError, ToolchainError, one_line
from featherweight.registry.lineage import Lineage, LineageGraph, LineageNode
from featherweight.system.toolchains import ALL_PACKAGES

SPEC = "1.6"
APPROACH = {"type": "self-supervised"}


def bill_of_materials(told: Lineage, licence: str = "") -> dict[str, Any]:
    """The bill as JSON: the model with its card, the checkpoint that it comes from, each text, and each library.

    licence: of the model, an SPDX expression; a lineage does not know it. The same bill for the same version.
    """
    graph, model = told.graph, _model(told, licence)
    parts = [*_checkpoint(graph), *(_dataset(node) for node in _texts(graph)), *_libraries(graph)]
    return {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPEC}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPEC,
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'{told.model}/{told.version}/{told.digest}')}",
        "version": 1,
        "metadata": {"timestamp": graph.nodes[-1].finished, "tools": {"components": [_tool(graph)]}, "component": model},
        "components": parts,
        "dependencies": [{"ref": model["bom-ref"], "dependsOn": [part["bom-ref"] for part in parts]}],
    }


def require_valid(bill: Mapping[str, Any]) -> None:
    """Raise IntegrityError where a bill does not keep CycloneDX's own schema, ToolchainError without the library that holds it."""
    try:
        from cyclonedx.schema import SchemaVersion
        from cyclonedx.validation.json import JsonStrictValidator
    except ImportError as error:
        raise ToolchainError("CycloneDX's schema is not installed; pip install 'featherweight[standards]'") from error
    wrong = JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bill))
    if wrong:
        raise IntegrityError(f"the bill of materials does not keep CycloneDX {SPEC}: {one_line(wrong)}")


def _model(told: Lineage, licence: str) -> dict[str, Any]:
    """The component that the bill is of."""
    graph = told.graph
    component: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": f"model:{told.digest}",
        "name": told.model,
        "version": told.version,
        "description": f"{graph.variant} on {told.engine}",
        "hashes": [_hash(told.digest)],
        "modelCard": _card(graph),
        "properties": _properties(
            {"stage": told.stage, "engine": told.engine, "variant": graph.variant, "mlflow_run": graph.run_id}
        ),
    }
    if licence:
        component["licenses"] = [{"expression": licence}]
    root = graph.checkpoint
    if root:
        component["pedigree"] = {"ancestors": [_component("machine-learning-model", root, _name(root))], "notes": _steps(graph)}
    return component


def _card(graph: LineageGraph) -> dict[str, Any]:
    """CycloneDX's model card: what it was made with, and what was measured with its confidence interval."""
    recipe: Any = graph.recipe_tree
    parameters = {"approach": APPROACH, "datasets": [{"ref": _ref(node)} for node in _texts(graph)]}
    parameters["task"] = str(recipe.get("task", "text-generation"))
    return {"modelParameters": parameters, "quantitativeAnalysis": {"performanceMetrics": list(_figures(graph.metrics))}}


def _figures(metrics: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    """Each figure; those that bound another one are its interval."""
    for name, value in sorted(metrics.items()):
        if name.removesuffix("_low").removesuffix("_high") != name:
            continue
        figure: dict[str, Any] = {"type": name, "value": f"{value:.6g}"}
        if f"{name}_low" in metrics and f"{name}_high" in metrics:
            bounds = {"lowerBound": f"{metrics[f'{name}_low']:.6g}", "upperBound": f"{metrics[f'{name}_high']:.6g}"}
            figure["confidenceInterval"] = bounds
        yield figure


def _checkpoint(graph: LineageGraph) -> list[dict[str, Any]]:
    """The base model."""
    root = graph.checkpoint
    return [] if root is None else [_component("machine-learning-model", root, _name(root)) | {"bom-ref": _ref(root)}]


def _dataset(node: LineageNode) -> dict[str, Any]:
    source = node.source or node.id
    told = {"type": "dataset", "name": node.id, "description": f"from {source}"}
    return _component("data", node, node.id) | {"bom-ref": _ref(node), "data": [told]}


def _libraries(graph: LineageGraph) -> Iterator[dict[str, Any]]:
    """Every library that shaped a stage's result, with its licence where the same version is installed here."""
    told = {(name.rpartition("/")[2], version) for node in graph.nodes for name, version in node.environment.items()}
    for name, version in sorted((name, version) for name, version in told if version != "absent" and name != ALL_PACKAGES):
        purl = f"pkg:pypi/{name.lower().replace('_', '-')}@{version.replace('+', '%2B')}"
        component: dict[str, Any] = {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}
        licence = _installed_licence(name, version)
        yield component | ({"licenses": [{"license": {"name": licence}}]} if licence else {})


def _installed_licence(name: str, version: str) -> str:
    """What a distribution says of its licence, '' where it says nothing or another version is installed."""
    try:
        told = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
    if importlib.metadata.version(name) != version:
        return ""
    said = next(iter([*(told.get_all("License-Expression") or ()), *(told.get_all("License") or ())]), "")
    classified = [one.rpartition(" :: ")[2] for one in told.get_all("Classifier") or () if one.startswith("License ::")]
    return said if said and "\n" not in said else ", ".join(classified)


def _component(kind: str, node: LineageNode, name: str) -> dict[str, Any]:
    told = _properties({"stage": node.stage, "node": node.id})
    return {"type": kind, "name": name, "version": node.digest[:12], "hashes": [_hash(node.digest)], "properties": told}


def _tool(graph: LineageGraph) -> dict[str, Any]:
    return {"type": "application", "name": "featherweight", "version": graph.commit}


def _texts(graph: LineageGraph) -> list[LineageNode]:
    return [node for node in graph.nodes if node.stage == "text"]


def _name(root: LineageNode) -> str:
    return Path(root.source).name or f"trained here ({root.id})"


def _steps(graph: LineageGraph) -> str:
    """What was done to the base model."""
    kinds = ("distill", "prune", "finetune", "quantize", "compile", "export")
    return ", then ".join(f"{node.stage} ({node.id})" for node in graph.nodes if node.stage in kinds)


def _ref(node: LineageNode) -> str:
    return f"{node.stage}:{node.id}:{node.digest}"


def _hash(digest: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": digest}


def _properties(told: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"name": f"featherweight:{name}", "value": value} for name, value in told.items()]
