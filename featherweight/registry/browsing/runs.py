"""The optimizations of a tracking server, and the report that each has logged."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.errors import GateError
from featherweight.store.mlflow_errors import mlflow_explained
from featherweight.store.tracking import open_artifacts
from featherweight.store.workspace import local_path
from featherweight.system.processes import has_ended

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

SHOWN = 100
REPORT = "report.html"
KIND = "featherweight.kind"


@dataclass(frozen=True)
class RunLine:
    """One optimization. state: 'running', 'finished', 'failed' or 'stopped'. started: UTC. winner: 'none' for none.

    told: its outcome or error in words.
    """

    id: str
    recipe: str
    state: str
    started: str
    winner: str
    told: str

    @classmethod
    def of(cls, run: Run) -> RunLine:
        """As its tags have it; a run whose process is gone was stopped, whatever MLflow still says."""
        tags, status = run.data.tags, run.info.status
        gone = status == "RUNNING" and has_ended(tags.get("featherweight.process", ""))
        state = "stopped" if gone else {"RUNNING": "running", "FINISHED": "finished", "FAILED": "failed"}.get(status, "stopped")
        told = tags.get("mlflow.note.content", "") if state == "finished" else tags.get("featherweight.error", "")
        started = datetime.fromtimestamp(run.info.start_time / 1000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
        return cls(
            run.info.run_id, tags.get("featherweight.recipe", ""), state, started, tags.get("featherweight.winner", ""), told
        )


def optimizations(client: MlflowClient, tracking_uri: str) -> list[RunLine]:
    """The latest of them, newest first, SHOWN at most."""
    with mlflow_explained(tracking_uri):
        experiments = [one.experiment_id for one in client.search_experiments()]
        wanted = f"tags.{KIND} = 'optimization'"
        found = client.search_runs(experiments, wanted, max_results=SHOWN, order_by=["attributes.start_time DESC"])
        return [RunLine.of(run) for run in found]


def report_of(client: MlflowClient, tracking_uri: str, run_id: str) -> bytes:
    """The report that an optimization logged. Raises GateError where there is no such optimization, or it has none yet."""
    missing = GateError(f"there is no report of run '{run_id[:64]}'")
    if not re.fullmatch(r"[0-9a-f]{32}", run_id):
        raise missing
    with mlflow_explained(tracking_uri, missing, files=True), tempfile.TemporaryDirectory() as scratch:
        run = client.get_run(run_id)
        if run.data.tags.get(KIND) != "optimization":
            raise missing
        local = local_path(run.info.artifact_uri)
        if local is None:
            return Path(open_artifacts(run.info.artifact_uri, tracking_uri).download_artifacts(REPORT, scratch)).read_bytes()
        page = local / REPORT
        if not page.is_file() or page.is_symlink():
            raise missing
        return page.read_bytes()
