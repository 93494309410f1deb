"""A version in the forms that other tools read, each held against its own library."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest

from featherweight.errors import IntegrityError, ServiceError
from featherweight.quantization.spec import QuantizeSpec
from featherweight.recipe.plan import Node
from featherweight.registry.bom import bill_of_materials, require_valid
from featherweight.registry.card import model_card
from featherweight.registry.lineage import Lineage, build, from_registry
from featherweight.registry.openlineage import emit, graph_events
from featherweight.store.workspace import Workspace
from flows.standards import write_standards
from tasks.openlineage import TARGET, told_to_openlineage
from tasks.parent_run import ParentRun
from tests.support.registering import METRICS, MODEL, Bench, bench

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return bench(tmp_path_factory.mktemp("standards"))


@pytest.fixture(scope="module")
def told(desk: Bench) -> Lineage:
    """A version from a text and a checkpoint with sources."""
    environment = {"torch": "2.13.0+cpu", "pyyaml": version("pyyaml"), "tvm": "absent"}
    text = desk.artifact("text/evaluation", "text", spec={"data": {"source": "s3://texts/may"}})
    root = desk.artifact("checkpoint", "load", spec={"source": "org/little"}, environment=environment)
    made = desk.artifact("w8/torch", parents={"checkpoint": root[1].digest}, environment=environment)
    parents = {"served": made[1].digest, "evaluation": text[1].digest}
    measured = desk.artifact("w8/torch/evaluate", "evaluate", parents=parents, metrics=METRICS)
    recipe = "name: may\ntask: text-generation\n"
    known = {"variant": "w8/torch", "recipe": recipe, "run_id": desk.run_id, "metrics": METRICS, "commit": "c0ffee"}
    graph = build([text, root, made, measured], made[1].digest, measured=measured[1].digest, **known)  # type: ignore[arg-type]
    desk.registry.register(desk.record("w8/torch", made[0], graph))
    return from_registry(desk.registry, MODEL, "1")


def test_the_bill_keeps_cyclonedx_own_schema_and_names_all_that_went_in(told: Lineage) -> None:
    bill = bill_of_materials(told, "Apache-2.0")
    require_valid(bill)
    assert bill == bill_of_materials(told, "Apache-2.0")
    model, parts = bill["metadata"]["component"], {part["name"]: part for part in bill["components"]}
    assert model["licenses"] == [{"expression": "Apache-2.0"}]
    assert parts.keys() == {"little", "text/evaluation", "torch", "pyyaml"}
    assert parts["pyyaml"]["licenses"] == [{"license": {"name": "MIT"}}]
    assert parts["torch"]["purl"] == "pkg:pypi/torch@2.13.0%2Bcpu"
    assert parts["little"]["hashes"][0]["content"] == told.graph.nodes[0].digest
    figures = {one["type"]: one for one in model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]}
    assert figures["speedup_1"]["confidenceInterval"] == {"lowerBound": "7.5", "upperBound": "8.5"}
    assert model["modelCard"]["modelParameters"]["datasets"] == [{"ref": parts["text/evaluation"]["bom-ref"]}]
    with pytest.raises(IntegrityError, match=r"does not keep CycloneDX 1\.6"):
        require_valid({**bill, "components": [{"type": "model"}]})


def test_the_card_is_read_by_the_hubs_library(told: Lineage) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard(model_card(told, "apache-2.0"))
    assert (card.data.license, card.data.base_model, card.data.datasets) == ("apache-2.0", "org/little", ["s3://texts/may"])
    assert {one.metric_type: one.metric_value for one in card.data.eval_results or ()}["bits_per_byte"] == METRICS["bits_per_byte"]
    assert "| speedup_1 | 8 | 7.5 to 8.5 |" in card.text
    assert told.graph.served[:12] in card.text


def test_events_go_to_a_file_and_to_a_server(told: Lineage, tmp_path: Path) -> None:
    said = write_standards(told, tmp_path / "deep" / "bom.json", tmp_path / "card.md", str(tmp_path / "events"), "")
    assert [line.partition(":")[0] for line in said] == ["CycloneDX bill of materials", "model card", "OpenLineage"]
    events = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    assert [event["eventType"] for event in events] == ["START", "COMPLETE"] * 4
    last = events[-1]
    assert (last["job"]["name"], last["run"]["facets"]["parent"]["job"]["name"]) == ("may/w8/torch/evaluate", "may")
    assert {one["name"] for one in last["inputs"]} >= {f"sha256:{told.graph.served}"}
    got: list[str] = []

    class Server(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["eventType"])
            self.send_response(201)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on standard error."""

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    assert emit(graph_events(told.graph), f"http://127.0.0.1:{server.server_port}") == 8
    server.shutdown()
    server.server_close()
    assert sorted(got) == ["COMPLETE"] * 4 + ["START"] * 4
    with pytest.raises(ServiceError, match="took 0 events and then failed"):
        emit(graph_events(told.graph), str(tmp_path / "no" / "folder" / "events"))


def test_stages_tell_as_they_run_where_a_target_is_named(desk: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = ParentRun(Workspace.at(tmp_path), desk.experiment, desk.run_id, {"featherweight.recipe": "may"})
    node = Node("w8", "quantize", "w8", QuantizeSpec.of(method="rtn", grid="int8"), {}, 0)
    monkeypatch.setenv(TARGET, str(tmp_path / "events"))
    with told_to_openlineage(node, {}, parent, desk.run_id) as made:
        made("d1")
    with pytest.raises(ValueError, match="broken"), told_to_openlineage(node, {}, parent, desk.run_id):
        raise ValueError("broken")
    events = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    assert [event["eventType"] for event in events] == ["START", "COMPLETE", "START", "FAIL"]
    assert events[1]["outputs"][0]["name"] == "sha256:d1"
    monkeypatch.setenv(TARGET, str(tmp_path / "no" / "folder"))
    with told_to_openlineage(node, {}, parent, desk.run_id) as made:  # what is away costs no stage
        made("d1")


def test_data_sets_are_named_on_the_runs_page(desk: Bench) -> None:
    desk.registry.log_datasets(desk.run_id, {"text/evaluation": ("e" * 64, "s3://texts/may")})
    (found,) = desk.registry.client.get_run(desk.run_id).inputs.dataset_inputs
    assert (found.dataset.name, found.tags[0].value, json.loads(found.dataset.source)) == (
        "text/evaluation",
        "evaluation",
        {"uri": "s3://texts/may", "sha256": "e" * 64},
    )
