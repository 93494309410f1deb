"""What the libraries are told through the environment, before they are imported."""

from __future__ import annotations

import os
import re
from pathlib import Path

from featherweight.masking import masked

QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_CLI_PROMPT": "false",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # the address of the server, with the password that stands in it
    "GX_ANALYTICS_ENABLED": "false",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "LLM_COMPRESSOR_LOG_LEVEL": "ERROR",
    "COMPRESSED_TENSORS_LOG_LEVEL": "ERROR",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
}

_SECRET = re.compile(r"(?i)passw|passphrase|secret|auth_string|credential|access_key|api_key|connection_url|(^|_)(token|pwd|pat)$")


def without_secrets() -> dict[str, str]:
    """The environment but for passwords, keys and tokens: for processes that run an engine or build a checkpoint's model."""
    return {name: value for name, value in os.environ.items() if not _SECRET.search(name) and masked(value) == value}


def configure(root: Path) -> None:
    """Environment of this process and its children, before Prefect or MLflow is imported; what the user has set stays."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("PREFECT_HOME", str(root.absolute() / "prefect"))
