"""MLflow's client comes alone where that is asked for, and the rest of MLflow when it is used."""

import subprocess
import sys

CLIENT = """
import sys
from featherweight.system import mlflow_import
mlflow_import.for_reading()
from mlflow import MlflowClient
MlflowClient("http://localhost:1", "http://localhost:1")
heavy = {"numpy", "pandas", "scipy", "fastapi"} & sys.modules.keys()
assert not heavy, heavy
import mlflow, mlflow.gateway, pandas
assert callable(mlflow.genai.evaluate) and callable(mlflow.set_tracking_uri)
"""


def test_mlflows_client_comes_alone_and_the_rest_when_it_is_used() -> None:
    seen = subprocess.run([sys.executable, "-c", CLIENT], capture_output=True, text=True, timeout=300)
    assert seen.returncode == 0, seen.stderr
