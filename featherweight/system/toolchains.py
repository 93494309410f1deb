"""Toolchains: engines whose pins cannot live in the main environment, each in a virtual environment of its own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from mmap import ACCESS_READ, mmap
from pathlib import Path

from featherweight.errors import ToolchainError
from featherweight.system.machine import RELEVANT, cpu_features
from featherweight.system.shipped import environments, in_checkout, shipped

ROOT = Path(__file__).resolve().parents[2]
LOCATION = "FEATHERWEIGHT_TOOLCHAINS"
REMEDY = "run `make setup`"
ALL_PACKAGES = "all packages"
ON_DEMAND = ("openvino", "optimum", "tvm", "llama.cpp-native")
"""Toolchains that `make setup` leaves out; `featherweight doctor --install NAME` installs them."""
# What set-up leaves in `.toolchains`: NAME.json says with what NAME was installed, or why it could not be.
RECORD = "{name}.json"


@dataclass(frozen=True)
class ToolchainStatus:
    """Whether a toolchain can be used; `reason` and `remedy` are empty where it can. absent: nobody tried to install it."""

    name: str
    ready: bool
    python: Path
    package: str = ""
    reason: str = ""
    remedy: str = ""
    absent: bool = False


def location() -> Path:
    """Folder of all toolchains: $FEATHERWEIGHT_TOOLCHAINS, else where `shipped` says."""
    given = os.environ.get(LOCATION)
    return Path(given).expanduser() if given else environments()


def remedy(name: str) -> str:
    """How a toolchain that is missing is installed."""
    return f"run `featherweight doctor --install {name}`" if name in ON_DEMAND or not in_checkout() else REMEDY


def interpreter(environment: Path) -> Path:
    """The Python of a virtual environment, wherever this operating system puts it."""
    return environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def status_of(name: str) -> ToolchainStatus:
    """The state of one toolchain."""
    python, record = interpreter(location() / name), _record(name)
    package = record.get("package", "")
    if record.get("error"):
        reason = f"its installation failed: {record['error']}"
        return ToolchainStatus(name, False, python, package, reason, f"{remedy(name)} to try again")
    if lacking := _lacking(record.get("cpu_flags", "")):
        reason = f"it was compiled for a CPU with {lacking[0]}, which this one lacks"
        return ToolchainStatus(name, False, python, package, reason, f"{remedy(name)} to compile it for this one")
    if not python.is_file():
        return ToolchainStatus(name, False, python, package, f"{python} does not exist", remedy(name), absent=True)
    return ToolchainStatus(name, True, python, package)


def python(name: str) -> Path:
    """The Python of a ready toolchain; raises ToolchainError saying why it is not ready and how to get it."""
    found = status_of(name)
    if not found.ready:
        raise ToolchainError(f"toolchain '{name}' is not ready: {found.reason}; {found.remedy}")
    return found.python


def join(name: str) -> None:
    """Let this process import what a toolchain holds, after its own packages.

    Raises ToolchainError where it is not ready, or was made with another Python.
    """
    python(name)
    folder = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = next((path for path in _packages(name) if path.is_dir() and folder in path.parts), None)
    if packages is None:
        raise ToolchainError(f"toolchain '{name}' was made with another Python than {folder}; {remedy(name)}")
    if str(packages) not in sys.path:
        sys.path.append(str(packages))


def distributions(name: str) -> tuple[str, ...]:
    """Every distribution that a toolchain holds, as its folder `NAME-VERSION.dist-info`; none where it is not installed."""
    return tuple(sorted({path.name for folder in _packages(name) for path in folder.glob("*.dist-info")}))


def version_of(name: str, library: str) -> str:
    """Of a distribution that a toolchain holds, 'absent' where it does not; of ALL_PACKAGES digits that tell sets of them apart."""
    held = distributions(name)
    if library == ALL_PACKAGES:
        return hashlib.sha256("\n".join(held).encode()).hexdigest()[:8] if held else "absent"
    found = (folder.removesuffix(".dist-info").rpartition("-") for folder in held)
    return next((version for known, _, version in found if re.sub("[-_.]+", "-", known).lower() == library), "absent")


def text_of(name: str, file: str) -> str:
    """The text of a file of a package that a toolchain holds, such as 'optimum/version.py'; empty where it does not."""
    found = next((folder / file for folder in _packages(name) if (folder / file).is_file()), None)
    return found.read_text(encoding="utf-8") if found else ""


@cache
def holds_text(name: str, files: str, text: str) -> bool:
    """Whether a file of a toolchain's packages that the pattern finds has the text in it, compiled code included."""
    found = (path for folder in _packages(name) for path in folder.glob(files))
    return any(_holds(path, text.encode()) for path in found)


def _holds(path: Path, text: bytes) -> bool:
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as seen:
        return seen.find(text) >= 0


def install(name: str) -> None:
    """Install a toolchain, or again what failed before, in the open. Raises ToolchainError where it cannot be."""
    script = shipped("infra/bootstrap.py")
    if not script.is_file():
        raise ToolchainError(f"toolchain '{name}' is installed from Featherweight's repository, and {script} does not exist")
    command, there = [sys.executable, str(script), "--toolchain", name, "--retry"], {LOCATION: str(location().absolute())}
    done = subprocess.run(command, env=os.environ | there, check=False)
    if done.returncode or not (found := status_of(name)).ready:
        raise ToolchainError(f"toolchain '{name}' could not be installed" + ("" if done.returncode else f": {found.reason}"))


def find(name: str, file: str) -> Path | None:
    """A file among the packages of a toolchain that is ready; None where it is not, or lacks it."""
    folders = _packages(name) if status_of(name).ready else ()
    return next((folder / file for folder in folders if (folder / file).is_file()), None)


def _lacking(flags: str) -> list[str]:
    """Of a CPU's flags those that speed hangs on and this CPU lacks."""
    return sorted(set(flags.split()).intersection(RELEVANT) - cpu_features())


def _packages(name: str) -> tuple[Path, ...]:
    """Where a toolchain's packages lie."""
    environment = location() / name
    return (environment / "Lib" / "site-packages", *environment.glob("lib/python*/site-packages"))


def _record(name: str) -> dict[str, str]:
    """What set-up noted about a toolchain; empty where it noted nothing readable."""
    try:
        record = json.loads((location() / RECORD.format(name=name)).read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
