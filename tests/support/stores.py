"""MLflow's tables in SQLite: a second to make, nothing to copy."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from featherweight.store.workspace import Workspace


@functools.cache
def empty_store() -> bytes:
    """A SQLite file with MLflow's tables and nothing in them."""
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory() as folder:
        MlflowClient(f"sqlite:///{folder}/mlflow.db").search_experiments()
        return Path(folder, "mlflow.db").read_bytes()


def new_workspace(root: Path) -> Workspace:
    """The workspace in `root`; where it is a new one, its tables are there already."""
    workspace = Workspace.at(root)
    if not (root / "mlflow.db").exists():
        (root / "mlflow.db").write_bytes(empty_store())
    return workspace
