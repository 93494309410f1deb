"""MLflow's scoring server of our models, whoever starts it (`mlflow models serve`, `featherweight serve`, a deployed folder).

MLflow reads a request before a model sees it, and tells what it cannot read with traces and paths, or with "Internal Server
Error" (what it leaves out of one that it can read: strict.py). All requests go through one function of its module, `invocations`,
looked up by its name at each: so a model of ours, as it is loaded inside such a server, puts `Guarded` around that function. Models
of others in the same process are answered as before (docs/decisions/architecture.md).
"""

from __future__ import annotations

import csv
import inspect
import io
import json
import logging
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from featherweight.errors import DataError, FeatherweightError, one_line, told
from featherweight.registry.served_engine import MOST_AT_ONCE
from featherweight.registry.serving.reasons import plain, reason, refusal
from featherweight.registry.serving.strict import CONVERSATIONAL, PARAMETERS, hold_predictions, ours

PROGRAM = f"{__name__}:application"
SERVER = "mlflow.pyfunc.scoring_server"
ARGUMENTS = ("data", "content_type", "model", "input_schema")
"""Of MLflow's `invocations` (3.17)."""
BODY_BYTES = 32 * 2**20
JSON, CSV, PARQUET = "application/json", "text/csv", "application/vnd.apache.parquet"
FORMATS = ("inputs", "instances", "dataframe_split", "dataframe_records")
PANDAS_INDEX = re.compile(r"__index_level_\d+__")
PARQUET_LIMITS = f"send at most {MOST_AT_ONCE} rows and {BODY_BYTES // 2**20} MiB"

log = logging.getLogger(__name__)


def application() -> Any:
    """The server of the folder, and with the settings, that MLflow's variables name."""
    from mlflow.pyfunc import scoring_server

    guard()  # whatever the folder's own code does
    return scoring_server.init(scoring_server.load_model_with_mlflow_config(os.environ[scoring_server._SERVER_MODEL_PATH]))


def guard() -> None:
    """Let our models take all that they are asked; and, where this process is MLflow's scoring server, be answered by reasons.

    Where MLflow's function is another than the one that is known, it is not changed, and the server's log says so.
    """
    hold_predictions()
    server: Any = sys.modules.get(SERVER)
    if server is None or isinstance(getattr(server, "invocations", None), Guarded):
        return
    try:
        found = tuple(inspect.signature(server.invocations).parameters)
    except (AttributeError, TypeError, ValueError):
        found = ()
    if found == ARGUMENTS:
        server.invocations = Guarded(server.invocations, server.InvocationsResponse)
        return
    log.warning(
        "this MLflow reads requests otherwise than the one that Featherweight knows: its own errors may hold traces and paths, and "
        "parameters that the model has not are left out; serve by `featherweight serve`"
    )


class Guarded:
    """MLflow's `invocations`, by which a request to one of our models is answered, or refused by its reason in one line."""

    def __init__(self, invocations: Any, response: Any) -> None:
        self._invocations, self._response = invocations, response

    def __call__(self, data: bytes, content_type: str | None, model: Any, input_schema: Any) -> Any:
        """Answer one request."""
        if not ours(model):
            return self._invocations(data, content_type, model, input_schema)
        if len(data) > BODY_BYTES:
            return self._said(refusal(413, "BAD_REQUEST", f"a request holds at most {BODY_BYTES // 2**20} MiB"))
        try:
            answer = self._invocations(*readable(data, content_type), model, input_schema)
        except Exception as error:  # what reads a request raises what it likes
            return self._said(_refused(error))
        return answer if answer.status < 400 else self._said(reason(answer.status, answer.response.encode()))

    def _said(self, answer: Any) -> Any:
        return self._response(bytes(answer.body).decode(), answer.status_code, JSON)


def readable(data: bytes, content_type: str | None) -> tuple[Any, str]:
    """A request as MLflow reads it for every model, and its type; one without a type is JSON. Raises DataError for what is none.

    Tables come as MLflow reads those of JSON. It takes the columns of a CSV file by their types, and fails where a model takes
    texts and conversations alike; a Parquet file it unpacks whole, whatever it unpacks to.
    """
    kind, separator, settings = (content_type or JSON).lower().partition(";")
    kind = kind.strip()
    if (read := READERS.get(kind)) is None:
        return data, kind + separator + settings
    found = read(data)
    if (length := _longest(found)) > MOST_AT_ONCE:
        raise DataError(f"{length} values beside each other in one request; send at most {MOST_AT_ONCE} at once")
    return found, JSON + separator + settings


def _object(data: bytes) -> dict[str, Any]:
    """A request in JSON, of which nothing is left out."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the request is no JSON: {one_line(error, 200)}") from error
    if not isinstance(found, dict):
        raise DataError(f"the request is no object; send one with {', '.join(FORMATS)}, messages or prompt")
    if found.keys().isdisjoint(CONVERSATIONAL - {"model"}):
        if sum(name in found for name in FORMATS) != 1:
            raise DataError(f"a request has one of {', '.join(FORMATS)}, or messages or prompt")
        if beside := sorted(found.keys() - {*FORMATS, PARAMETERS}):
            raise DataError(f"'{one_line(beside[0], 60)}' stands beside the texts; parameters stand under '{PARAMETERS}'")
    return found


def _of_csv(data: bytes) -> dict[str, Any]:
    """The head and the rows of a CSV file, all texts. A first column without a name is the index that pandas writes."""
    try:
        rows = [row for row in csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True) if row]
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"the request is no CSV: {one_line(error, 200)}") from error
    if not rows:
        raise DataError("the CSV is empty; its first line names the columns")
    for number, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise DataError(f"row {number} of the CSV has another number of values, {len(row)}, than its head, {len(rows[0])}")
    first = 1 if not rows[0][0] and len(rows[0]) > 1 else 0
    return _split(rows[0][first:], [row[first:] for row in rows[1:]])


def _of_parquet(data: bytes) -> dict[str, Any]:
    """The columns and the rows of a Parquet file, without pandas's index; piece by piece, as a short one may hold gigabytes."""
    from pyarrow.parquet import ParquetFile

    file = ParquetFile(io.BytesIO(data))
    about, room, rows = file.metadata, BODY_BYTES, list[list[Any]]()
    packed = sum(about.row_group(place).total_byte_size for place in range(about.num_row_groups))
    names = [name for name in file.schema_arrow.names if not PANDAS_INDEX.fullmatch(name)]
    if about.num_rows > MOST_AT_ONCE or packed > BODY_BYTES:
        raise DataError(f"a Parquet file of {about.num_rows} rows and {packed} bytes; {PARQUET_LIMITS}")
    for batch in file.iter_batches(batch_size=max(1, BODY_BYTES // max(1, packed)), columns=names):
        room -= batch.nbytes
        if room < 0:
            raise DataError(f"a Parquet file that unpacks to more than {BODY_BYTES} bytes; {PARQUET_LIMITS}")
        rows += [list(row) for row in zip(*(column.to_pylist() for column in batch.columns), strict=True)]
    return _split(names, rows)


READERS: dict[str, Callable[[bytes], dict[str, Any]]] = {JSON: _object, CSV: _of_csv, PARQUET: _of_parquet}


def _split(columns: list[str], rows: list[list[Any]]) -> dict[str, Any]:
    return {"dataframe_split": {"columns": columns, "data": rows}}


def _longest(value: Any, depth: int = 4) -> int:
    """The length of the longest list or object down to the cells of a table."""
    if not isinstance(value, (list, dict)):
        return 0
    if depth == 1 or len(value) > MOST_AT_ONCE:
        return len(value)
    return max(len(value), *(_longest(one, depth - 1) for one in (value.values() if isinstance(value, dict) else value)), 0)


def _refused(error: Exception) -> Any:
    """What is answered in place of an error: our reason, where MLflow put its own words around it."""
    from mlflow.exceptions import MlflowException

    around = (error, error.__cause__, error.__context__)
    if own := next((one for one in around if isinstance(one, FeatherweightError)), None):
        wrong = isinstance(own, DataError)
        return refusal(400 if wrong else 500, "INVALID_PARAMETER_VALUE" if wrong else "INTERNAL_ERROR", plain(str(own)))
    if not isinstance(error, MlflowException):
        return refusal(400, "BAD_REQUEST", plain(f"the request cannot be read: {told(error)}"))
    if trace := error.json_kwargs.get("stack_trace"):
        log.error("%s", trace)  # for whoever runs the server, in place of whoever asked
    return refusal(400, "BAD_REQUEST", plain(error.message))
