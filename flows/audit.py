"""Looking back: the table of a finished optimization, and the lineage of a registered version."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from featherweight.errors import GateError, IntegrityError
from featherweight.registry.lineage import Lineage, Verdict, from_registry, verify
from featherweight.registry.registry import Registry
from featherweight.report.result import OptimizationResult
from featherweight.store.mlflow_errors import mlflow_explained
from featherweight.store.workspace import Workspace
from flows.promote import parse_reference
from tasks.parent_run import connect

RESULT = "result.json"


@dataclass(frozen=True)
class Audit:
    """A lineage and, where asked for, what verifying it found."""

    lineage: Lineage
    verdicts: tuple[Verdict, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**json.loads(self.lineage.to_json()), "verdicts": [asdict(verdict) for verdict in self.verdicts]}

    def to_text(self) -> str:
        """The lineage, then one line per verified part."""
        lines = [f"{v.state:8} {v.part}{f'  {v.reason}' if v.reason else ''}" for v in self.verdicts]
        return "\n".join([self.lineage.to_text(), *(["", "verified:", *lines] if lines else [])])

    def raise_if_altered(self) -> None:
        """Raise IntegrityError naming the parts that are not what they were."""
        altered = [verdict.part for verdict in self.verdicts if verdict.state == "altered"]
        if altered:
            raise IntegrityError(f"altered since it was registered: {', '.join(altered)}")


def audit(workspace: Workspace, reference: str, check: bool) -> Audit:
    """The lineage of a registered version, verified where `check`. Raises GateError where there is no such version."""
    registry = Registry(workspace.tracking_uri)
    registry.check()
    found = from_registry(registry, *parse_reference(reference, "champion"))
    return Audit(found, tuple(verify(found, registry)) if check else ())


def past_result(workspace: Workspace, run_id: str) -> OptimizationResult:
    """The result of a finished optimization: the latest where `run_id` is empty. Raises GateError where there is none."""
    client = connect(workspace)
    if not run_id:
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        wanted = "tags.featherweight.kind = 'optimization' AND attributes.status = 'FINISHED'"
        runs = client.search_runs(experiments, wanted, order_by=["attributes.start_time DESC"], max_results=1)
        if not runs:
            raise GateError(f"no finished optimization in {workspace.root}; run `featherweight optimize RECIPE` first")
        run_id = runs[0].info.run_id
    return OptimizationResult.from_dict(json.loads(_read(workspace, run_id)))


def _read(workspace: Workspace, run_id: str) -> str:
    from mlflow.artifacts import download_artifacts

    with tempfile.TemporaryDirectory() as folder:
        uri, missing = workspace.tracking_uri, GateError(f"run '{run_id}' holds no result; `featherweight ui` lists the runs")
        with mlflow_explained(uri, missing, files=True):
            got = download_artifacts(run_id=run_id, artifact_path=RESULT, dst_path=folder, tracking_uri=uri)
        return Path(got).read_text()
