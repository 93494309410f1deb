"""What MLflow's own pages lead to: from a version to its model and run, and back."""

from __future__ import annotations

import json
from pathlib import Path

import mlflow

from featherweight.registry.auditing import audit_model
from featherweight.registry.registry import Measured
from tests.support.registering import METRICS, MODEL, Bench, desk

__all__ = ["desk"]


def leads(desk: Bench) -> None:
    """From the version to the LoggedModel and the run, from the LoggedModel to the version and the run."""
    version = desk.registry.register(desk.winner("one"))
    client, model_id = desk.registry.client, version.tag("model_id")
    found = client.get_model_version(MODEL, "1")
    assert (found.source, found.run_id) == (f"models:/{model_id}", desk.run_id)
    logged = client.get_logged_model(model_id)
    assert json.loads(logged.tags["mlflow.modelVersions"]) in ([{"name": MODEL, "version": n}] for n in (1, "1"))
    assert logged.source_run_id == desk.run_id
    assert [one.model_id for one in getattr(client.get_run(desk.run_id).outputs, "model_outputs", [])] == [model_id]
    assert version.source == logged.artifact_location == desk.registry.location(version)


def test_a_store_in_this_process(desk: Bench) -> None:
    before = mlflow.get_tracking_uri()
    leads(desk)
    assert mlflow.get_tracking_uri() == before


def test_a_variants_figures_lead_to_the_run_that_measured_it_and_to_the_text(desk: Bench) -> None:
    client = desk.registry.client
    measuring = client.create_run(desk.experiment).info.run_id
    told = Measured(measuring, "text/evaluation", "e" * 64, "s3://texts/may")
    model_id = desk.registry.log_variant(desk.run_id, "one", METRICS, measured=told)
    inputs = client.get_run(measuring).inputs
    assert [one.model_id for one in inputs.model_inputs] == [model_id]
    assert [one.dataset.name for one in inputs.dataset_inputs] == ["text/evaluation"]
    figures = client.get_logged_model(model_id).metrics
    assert {(one.dataset_name, one.dataset_digest) for one in figures or ()} == {("text/evaluation", "e" * 36)}
    client.delete_run(measuring)
    assert desk.registry.log_variant(desk.run_id, "two", METRICS, measured=told)


def test_a_version_whose_tag_leads_elsewhere_than_mlflow_serves_from_is_told(desk: Bench, tmp_path: Path) -> None:
    desk.registry.register(desk.winner("one"))
    client = desk.registry.client
    client.set_model_version_tag(MODEL, "1", "featherweight.location", tmp_path.as_uri())
    told = [(one.part, one.state) for one in audit_model(desk.registry, MODEL) if one.state != "ok"]
    assert told and told[0][1] in ("altered", "missing")
