"""The one translation of what MLflow, its HTTP client, its database and its artifact store raise into errors of ours."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from featherweight.errors import FeatherweightError, Forbidden, ServiceError, Unreachable, one_line

# MLflow answers an unknown alias with the second.
MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND", "NoSuchKey", "404")
# MLflow's client tells of a connection that failed in words only, and so do PostgreSQL's drivers. It begins with the same words
# where a server, or a gateway before it, answers with a status and no JSON: 4xx is what the server says, 5xx the gateway.
_NO_SERVER = ("API request to", "Max retries exceeded", "Connection refused", "Connection aborted", "Read timed out")
_ANSWERED = re.compile(r"API request to endpoint .* failed with error code 4(?!08|29)")
_NO_DATABASE = ("could not connect", "connection to server", "Connection refused", "server closed the connection", "starting up")
_LOST_FILE = re.compile(r"downloading one or more artifacts from (\S+):\s+##### File (.+?) #####\s+(.+)")
NO_RIGHT = "PERMISSION_DENIED"
REFUSED = ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED")


@contextmanager
def mlflow_explained(tracking_uri: str, missing: FeatherweightError | None = None, files: bool = False) -> Iterator[None]:
    """Let a block that talks to MLflow fail in one line: ServiceError, or `missing` where what it asks for is not there.

    files: an OSError of the block is the artifact store's, too. Errors that are neither MLflow's nor of what is below it pass.
    """
    try:
        yield
    except FeatherweightError:
        raise
    except Exception as error:
        if not (_is_service(error) or (files and isinstance(error, OSError))):
            raise
        reason = _reason(error)
        if missing is not None and _is_missing(error):
            raise type(missing)(f"{missing} ({reason})") from error
        kind = Unreachable if _is_away(error) else Forbidden if _code(error) == NO_RIGHT else ServiceError
        raise kind(f"MLflow at {tracking_uri} {_verdict(error, reason)}") from error


def _is_service(error: Exception) -> bool:
    """Whether MLflow raised it, or one of the libraries by which it reaches its server, database and artifacts."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    return isinstance(error, MlflowException | RequestException | SQLAlchemyError | Boto3Error | BotoCoreError | ClientError)


def _is_away(error: Exception) -> bool:
    """Whether nobody answered: MLflow's server, its database or its artifacts' server, or a gateway before them."""
    from botocore.exceptions import HTTPClientError
    from requests import ConnectionError, Timeout
    from sqlalchemy.exc import InterfaceError, OperationalError

    if isinstance(error, ConnectionError | Timeout | HTTPClientError):
        return True
    if isinstance(error, OperationalError | InterfaceError):
        return error.connection_invalidated or any(words in str(error.orig) for words in _NO_DATABASE)
    if _ANSWERED.match(str(error)):
        return False
    return _code(error) == "TEMPORARILY_UNAVAILABLE" or any(words in str(error) for words in _NO_SERVER)


def _code(error: Exception) -> str:
    """The code by which MLflow, or the S3 server, says what is wrong; '' where it says none."""
    answer = getattr(error, "response", None)
    coded = answer.get("Error", {}).get("Code", "") if isinstance(answer, dict) else getattr(error, "error_code", "")
    return str(coded or "")


def _is_missing(error: Exception) -> bool:
    """Whether what was asked for is not there. A local artifact store says so by an OSError without a number."""
    if isinstance(error, FileNotFoundError) or (type(error) is OSError and error.errno is None):
        return True
    return _code(error) in MISSING


def _reason(error: Exception) -> str:
    """The error in a few words; of a database's only what the database said, not the statement and where to read on."""
    said = getattr(error, "orig", None) or error
    if lost := _LOST_FILE.search(str(said)):
        return one_line(f"'{lost[2]}' of {lost[1]} could not be fetched: {lost[3]}", 300)
    return one_line(str(said).partition("\n")[0] or type(error).__name__, 300)


def _verdict(error: Exception, reason: str) -> str:
    """What failed, and the way out."""
    if _code(error) in REFUSED:
        return f"refuses the credentials ({reason}); set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    if _code(error) == NO_RIGHT:
        return f"does not let this user do that ({reason}); ask its administrator, or set other MLFLOW_TRACKING_USERNAME"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"has no space left on the disk ({reason}); free some, run it again"
    if type(error).__module__.startswith("boto"):
        return f"cannot reach its artifacts ({reason}); check MLFLOW_S3_ENDPOINT_URL and the AWS credentials"
    if _LOST_FILE.search(str(error)):
        return f"has a file that its artifact store does not give: {reason}"
    return f"failed: {reason}; check that it runs and MLFLOW_TRACKING_URI"
