"""A password in the address of MLflow's server is nowhere: not in files, databases, artifacts, nor on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from featherweight.errors import CheckpointError, ServiceError
from featherweight.registry import shared_witness
from featherweight.registry.keys import Keys
from featherweight.system.environment import QUIET
from featherweight.system.processes import held_port
from tests.support import started
from tests.support.mlflow_server import mlflow_server

SECRET = "hunter2"


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Where nobody listens."""
    with held_port() as port:
        yield port


@pytest.mark.slow
@pytest.mark.server
def test_a_password_is_left_nowhere(
    harness: Path,
    silent_port: int,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A run that fails tells the most: messages, tags, a nested run's error, the flow run's state."""
    from flows.optimize import optimize_flow

    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    monkeypatch.setenv("FEATHERWEIGHT_SERVE_TOKEN", SECRET)
    nowhere = f"ada:{SECRET}@127.0.0.1:{silent_port}"
    monkeypatch.setenv("FEATHERWEIGHT_OPENLINEAGE", f"http://{nowhere}?api_key={SECRET}")
    monkeypatch.setenv("FEATHERWEIGHT_WITNESS", f"s3://ada:{SECRET}@bucket/prefix")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{nowhere}")
    (tmp_path / "text.txt").write_text(
        "".join(f"The little model number {n} went for a walk of {n} steps.\n\n" for n in range(200))
    )
    tree = {
        "name": "planted",
        "checkpoint": {"source": str(tmp_path / "nowhere")},
        "data": {"source": str(tmp_path / "text.txt")},
        "stages": {"export": {"half": {"engine": "torch", "compute_type": "bfloat16"}}},
        "promote": {"model": "planted"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    with mlflow_server(tmp_path, f"sqlite:///{tmp_path}/server.db") as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url.replace("://", f"://ada:{SECRET}@"))
        with pytest.raises(CheckpointError) as caught:
            optimize_flow(str(tmp_path / "recipe.yaml"), workspace=str(tmp_path / "workspace"))
    with pytest.raises(ServiceError, match="not a valid S3 address") as unwitnessed:
        shared_witness.add(1, "1:mark", Keys(tmp_path))
    told = capfd.readouterr()
    assert [line for line in started.lines() if "mlflow server" in line]
    assert [line for line in started.lines() if SECRET in line] == []
    assert SECRET not in str(unwitnessed.value) + caplog.text
    places = {path for folder in (tmp_path, harness) for path in folder.rglob("*") if path.is_file()}
    assert {"server.db", "prefect.db"} <= {path.name for path in places}
    assert SECRET not in told.out + told.err + str(caught.value)
    assert [str(path) for path in places if SECRET.encode() in path.read_bytes()] == []
