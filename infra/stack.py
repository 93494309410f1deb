"""A team's servers on one machine, all installed by pip: PostgreSQL, S3, MLflow, Prefect, a worker, a guard. `make stack` runs it.

PostgreSQL comes first, then the lines of infra/Procfile in order, each when the one before answers. Every server asks for
credentials, which are made at the first start. Data, logs and secrets lie in `.featherweight/stack`; nothing listens beyond this
machine. Ctrl-C stops all.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import secrets
import shlex
import signal
import string
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from postgres import address, serve_postgres

from featherweight.errors import FeatherweightError, ServiceError
from featherweight.system.environment import QUIET
from featherweight.system.processes import held_port
from featherweight.system.servers import LOCAL, await_url, require_free, start, stop
from featherweight.system.services import LEASES

ROOT = Path(__file__).resolve().parents[1]
PROCFILE = ROOT / "infra" / "Procfile"
HEALTH = {"s3": "http://{host}:{S3_PORT}", "mlflow": "http://{host}:{MLFLOW_PORT}/health"}
HEALTH |= {"prefect": "http://{host}:{PREFECT_PORT}/api/health", "guard": "http://{host}:{GUARD_PORT}/health"}
SERVERS = {"s3": 9000, "mlflow": 5000, "prefect": 4200, "postgres": 5432, "guard": 8100}
SECRETS = ("s3", "postgres", "mlflow", "mlflow_session", "mlflow_webhooks", "prefect")
# What a shell needs in order to use the stack, and all that the worker and the guard are given.
CLIENT = (
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "PREFECT_API_URL",
    "PREFECT_API_AUTH_STRING",
)
CLIENT += ("AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


def procfile(text: str) -> dict[str, str]:
    """Name and command of each line."""
    lines = (line.partition(":") for line in text.splitlines() if line.strip() and not line.startswith("#"))
    return {name.strip(): command.strip() for name, _, command in lines}


def command_of(line: str, variables: dict[str, str]) -> list[str]:
    """A Procfile command with its $VARIABLES filled in, its program taken from this environment."""
    words = [string.Template(word).substitute(variables) for word in shlex.split(line)]
    return [str(Path(sys.executable).parent / words[0]), *words[1:]]


def stack_secrets(folder: Path) -> dict[str, str]:
    """The passwords of this stack, made at its first start and readable by its owner only."""
    path = folder / "secrets.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if missing := [name for name in SECRETS if name not in known]:
        known |= {name: secrets.token_hex(20) for name in missing}
        part = folder / "secrets.part"
        part.unlink(missing_ok=True)
        part.touch(mode=0o600)
        part.write_text(json.dumps(known))
        part.replace(path)
    return dict(known)


def settings(folder: Path, ports: dict[str, int]) -> dict[str, str]:
    """Every variable that the servers and their clients read. None stands on a command line, which others can list."""
    known, s3 = stack_secrets(folder), f"http://{LOCAL}:{ports['S3_PORT']}"
    own = {"STACK": str(folder), "AWS_ACCESS_KEY_ID": "featherweight", "AWS_SECRET_ACCESS_KEY": known["s3"]}
    # rclone reads a list in CSV, hence the quotes.
    own |= {"RCLONE_AUTH_KEY": f'"featherweight,{known["s3"]}"', "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    own |= {"AWS_ENDPOINT_URL_S3": s3, "MLFLOW_S3_ENDPOINT_URL": s3, "AWS_DEFAULT_REGION": "us-east-1"}
    own |= mlflow_settings(folder, ports, known) | prefect_settings(folder, ports, known)
    return {**QUIET, **own, **{key: str(port) for key, port in ports.items()}}


def mlflow_settings(folder: Path, ports: dict[str, int], known: dict[str, str]) -> dict[str, str]:
    """MLflow asks for a user and a password, and answers to its own names only."""
    port = ports["MLFLOW_PORT"]
    names = [f"{host}:{port}" for host in (LOCAL, "localhost")]
    return {
        "MLFLOW_BACKEND_STORE_URI": address("mlflow", ports["POSTGRES_PORT"], known["postgres"]),
        "MLFLOW_AUTH_CONFIG_PATH": str(_auth_settings(folder, ports["POSTGRES_PORT"], known["postgres"])),
        "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
        "MLFLOW_AUTH_ADMIN_PASSWORD": known["mlflow"],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": known["mlflow_session"],
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(names),
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": ",".join(f"http://{name}" for name in names),
        **webhook_settings(known),
        "MLFLOW_TRACKING_URI": f"http://{LOCAL}:{port}",
        "MLFLOW_TRACKING_USERNAME": "admin",
        "MLFLOW_TRACKING_PASSWORD": known["mlflow"],
    }


def webhook_settings(known: dict[str, str]) -> dict[str, str]:
    """MLflow may call the guard. Its administrators alone make webhooks, whose secrets its database holds encrypted."""
    key = base64.urlsafe_b64encode(hashlib.sha256(known["mlflow_webhooks"].encode()).digest()).decode()
    allowed = {"MLFLOW_WEBHOOK_ALLOWED_SCHEMES": "http,https", "MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS": "true"}
    return {**allowed, "MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY": key, "MLFLOW_WEBHOOK_CACHE_TTL": "5"}


def _auth_settings(folder: Path, port: int, password: str) -> Path:
    """mlflow/basic_auth.ini with the users in the stack's PostgreSQL; it holds the password."""
    path, template = folder / "basic_auth.ini", ROOT / "mlflow" / "basic_auth.ini"
    lines = template.read_text().splitlines()
    users = f"database_uri = {address('mlflow_users', port, password)}"
    path.touch(mode=0o600)
    path.write_text("\n".join(users if line.startswith("database_uri") else line for line in lines) + "\n")
    return path


def prefect_settings(folder: Path, ports: dict[str, int], known: dict[str, str]) -> dict[str, str]:
    """Prefect asks for an auth string, and lets its own page alone call it from a browser."""
    port = ports["PREFECT_PORT"]
    return {
        **LEASES,
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": address("prefect", ports["POSTGRES_PORT"], known["postgres"], "+asyncpg"),
        "PREFECT_SERVER_API_AUTH_STRING": f"featherweight:{known['prefect']}",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://{LOCAL}:{port},http://localhost:{port}",
        "PREFECT_API_AUTH_STRING": f"featherweight:{known['prefect']}",
        "PREFECT_API_URL": f"http://{LOCAL}:{port}/api",
        "PREFECT_HOME": str(folder / "prefect"),
    }


def environment_of(name: str, variables: dict[str, str]) -> dict[str, str]:
    """What a process is told: the worker runs what recipes ask for, and gets no key of a server; nor does the guard."""
    if name not in ("worker", "guard"):
        return variables
    kept = {*QUIET, *CLIENT, "AWS_DEFAULT_REGION", "MLFLOW_S3_ENDPOINT_URL", "PREFECT_HOME", "STACK"}
    return {key: value if key in kept else "" for key, value in variables.items()}


def postgres(folder: Path, stack: ExitStack, port: int | None = None, password: str | None = None) -> dict[str, str]:
    """Start PostgreSQL with the databases of the stack; returns MLflow's address. A free port and a new password by default."""
    port, password = port or stack.enter_context(held_port()), password or secrets.token_hex(20)
    serve_postgres(folder, port, password, ("mlflow", "mlflow_users", "prefect"), stack)
    return {"MLFLOW_DATABASE": address("mlflow", port, password, "+psycopg2")}


def serve(folder: Path, ports: dict[str, int], stack: ExitStack) -> dict[str, subprocess.Popen[bytes]]:
    """Start everything, in order; what was started ends with `stack`. Raises ServiceError where one does not come up."""
    require_free(ports)
    folder.mkdir(parents=True, exist_ok=True, mode=0o711)
    (folder / "s3" / "featherweight").mkdir(parents=True, exist_ok=True)
    variables = settings(folder, ports)
    print("postgres …", flush=True)
    postgres(folder / "postgres", stack, ports["POSTGRES_PORT"], stack_secrets(folder)["postgres"])
    processes = {}
    for name, line in procfile(PROCFILE.read_text()).items():
        print(f"{name} …", flush=True)
        log = folder / f"{name}.log"
        processes[name] = process = start(command_of(line, variables), log, environment_of(name, variables))
        stack.callback(stop, process)
        if name in HEALTH:
            await_url(HEALTH[name].format(host=LOCAL, **ports), process, name, log)
    write_client(folder / "client.env", variables)
    return processes


def write_client(path: Path, variables: dict[str, str]) -> None:
    """Shell lines that point a client at this stack; they hold its passwords, so their owner alone may read them."""
    path.touch(mode=0o600)
    path.write_text("".join(f"export {name}={shlex.quote(variables[name])}\n" for name in CLIENT))


def watch(processes: dict[str, subprocess.Popen[bytes]], folder: Path) -> None:
    """Return never, or raise ServiceError when a server ends by itself."""
    while True:
        for name, process in processes.items():
            if process.poll() is not None:
                raise ServiceError(f"{name} ended with {process.returncode}; see {folder / f'{name}.log'}")
        time.sleep(0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / ".featherweight" / "stack", help="data, logs and keys")
    for name, port in SERVERS.items():
        parser.add_argument(f"--{name}-port", type=int, default=port)
    options = parser.parse_args()
    ports = {f"{name.upper()}_PORT": getattr(options, f"{name}_port") for name in SERVERS}
    folder = options.folder.absolute()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with ExitStack() as stack:
            processes = serve(folder, ports, stack)
            print(f"MLflow http://{LOCAL}:{ports['MLFLOW_PORT']}  Prefect http://{LOCAL}:{ports['PREFECT_PORT']}")
            print(f"users: admin in MLflow, featherweight in Prefect; passwords in {os.path.relpath(folder / 'client.env')}")
            print(f"in another shell: . {os.path.relpath(folder / 'client.env')}   (Ctrl-C here stops all)", flush=True)
            watch(processes, folder)
    except KeyboardInterrupt:
        return 0
    except FeatherweightError as error:
        print(f"stack: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
