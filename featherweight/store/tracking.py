"""Opening MLflow's tracking store and registry."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.system.locks import locked_file

if TYPE_CHECKING:
    from mlflow import MlflowClient


def open_client(tracking_uri: str) -> MlflowClient:
    """A client of the tracking store and the registry at one URI; nothing global is set.

    A SQLite file gets its tables here, from one process at a time: MLflow does not lock it, and of several commands that begin in a
    fresh workspace at once all but one would die of tables that are there already.
    """
    from mlflow import MlflowClient

    with _turn(tracking_uri):
        client = MlflowClient(tracking_uri, tracking_uri)
        if tracking_uri.startswith("sqlite:"):
            client.search_experiments(max_results=1)
        return client


def open_artifacts(uri: str, tracking_uri: str) -> Any:
    """MLflow's repository of the artifacts below a URI.

    A file that a server lists and does not give is asked for three times each by MLflow and by what it calls, which alone takes
    a minute; here that asks once more, so that it is a quarter of a minute in all.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
    from mlflow.utils import request_utils

    if not isinstance(request_utils.cloud_storage_http_request, partial):  # which the downloads of chunks alone look up there
        request_utils.cloud_storage_http_request = partial(request_utils.cloud_storage_http_request, max_retries=1)
    return get_artifact_repository(uri, tracking_uri=tracking_uri, registry_uri=tracking_uri)


def _turn(tracking_uri: str) -> AbstractContextManager[None]:
    scheme, _, path = tracking_uri.partition(":///")
    file = Path(path.partition("?")[0])
    if scheme != "sqlite" or not file.name or not file.parent.is_dir():
        return nullcontext()
    return locked_file(file.with_name(f"{file.name}.lock"))
