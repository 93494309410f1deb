"""What processes are told that run an engine: everything but passwords."""

from __future__ import annotations

import pytest

from featherweight.runtimes.client import environment

SECRET = "hunter2"
PLANTED = {
    **dict.fromkeys(("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "MLFLOW_FLASK_SERVER_SECRET_KEY"), SECRET),
    **dict.fromkeys(("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "PGPASSWORD", "RCLONE_S3_SECRET"), SECRET),
    **dict.fromkeys(("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "OPENLINEAGE_API_KEY", "PREFECT_API_KEY"), SECRET),
    "FEATHERWEIGHT_SERVE_TOKEN": SECRET,
    "PREFECT_API_AUTH_STRING": f"featherweight:{SECRET}",
    "MLFLOW_TRACKING_URI": f"https://ada:{SECRET}@mlflow.example",
    "PREFECT_API_URL": f"https://ada:{SECRET}@prefect.example/api",
    "FEATHERWEIGHT_OPENLINEAGE": f"https://ada:{SECRET}@lineage.example",
    "FEATHERWEIGHT_WITNESS": f"s3://ada:{SECRET}@bucket/prefix",
    "AWS_ENDPOINT_URL_S3": f"http://ada:{SECRET}@s3.example:9000",
    "OPENLINEAGE_URL": f"https://lineage.example?api_key={SECRET}",
    "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://ada:{SECRET}@db/prefect",
}


def test_an_engine_is_given_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/lib")
    given = environment(3)
    assert {name for name, value in given.items() if SECRET in value} == set()
    assert (given["LD_LIBRARY_PATH"], given["OMP_NUM_THREADS"], given["TOKENIZERS_PARALLELISM"]) == ("/opt/lib", "3", "false")
    assert "PATH" in given
