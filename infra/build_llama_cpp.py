"""Compiles llama.cpp's library for the CPU of this machine: `featherweight doctor --install llama.cpp-native` runs it.

Its sources are those of the package `xllamacpp`, so that the structs that Featherweight passes are the same. It wants a C++
compiler; CMake and Ninja come with the toolchain. Eight minutes of a core, in all.

Usage: build_llama_cpp.py PYTHON-WITH-PIP FILE-OF-REQUIREMENTS, with the Python of the toolchain.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path

PACKAGE = "llama_cpp_native"
SHOWN = 20
"""After so many of Ninja's steps a line is printed."""
SETTINGS = {
    "CMAKE_BUILD_TYPE": "Release",
    "CMAKE_INSTALL_RPATH": "$ORIGIN",
    "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
    "BUILD_SHARED_LIBS": "ON",
    "GGML_NATIVE": "ON",
    "GGML_CCACHE": "OFF",
    **{f"LLAMA_BUILD_{part}": "OFF" for part in ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER", "APP")},
    "LLAMA_OPENSSL": "OFF",
}


class BuildFailure(Exception):
    """What did not work, in one line."""


def main() -> int:
    pip, requirements = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        with tempfile.TemporaryDirectory(prefix="llama-cpp-") as folder:
            version, sources = fetched(pip, requirements, Path(folder))
            built = compiled(sources, Path(folder, "build"))
            install(built, Path(sysconfig.get_path("purelib")), version)
    except BuildFailure as failure:
        print(f"error: {failure}")
        return 1
    return 0


def fetched(pip: Path, requirements: Path, folder: Path) -> tuple[str, Path]:
    """The version of the source package that is required, and where llama.cpp's sources lie now; pip compares its digest."""
    command = [str(pip), "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "xllamacpp", "--require-hashes"]
    done = subprocess.run([*command, "--dest", str(folder), "-r", str(requirements)], capture_output=True, text=True)
    archive = next(folder.glob("*.tar.gz"), None)
    if done.returncode or archive is None:
        raise BuildFailure(f"pip could not download llama.cpp's sources: {last_line(done.stderr)}")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    name = archive.name.removesuffix(".tar.gz")
    return name.partition("-")[2], folder / name / "thirdparty" / "llama.cpp"


def compiled(sources: Path, build: Path) -> list[Path]:
    """The shared libraries: llama.cpp's own and those of ggml that it loads."""
    places = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    tools = {name: shutil.which(name, path=places) for name in ("cmake", "ninja")}
    if missing := [name for name, found in tools.items() if found is None]:
        raise BuildFailure(f"{' and '.join(missing)} not found")
    given = [f"-D{name}={value}" for name, value in SETTINGS.items()]
    followed(
        [str(tools["cmake"]), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools['ninja']}", "-S", str(sources), "-B", str(build), *given]
    )
    followed([str(tools["ninja"]), "-C", str(build), "llama"])
    return [path for path in sorted(build.rglob("lib*.so*")) if path.is_file()]


def followed(command: list[str]) -> None:
    """Run a step of the build; of its lines a few are shown as it goes on, and the error where there is one."""
    lines: list[str] = []
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for line in process.stdout or ():
            lines.append(line)
            step, _, steps = line.partition("]")[0].removeprefix("[").partition("/")
            if step.isdigit() and (int(step) % SHOWN == 0 or step == steps):
                print(f"{step} of {steps} steps of the compilation", flush=True)
    if process.returncode:
        raise BuildFailure(f"{Path(command[0]).name}: {cause(lines)}")


def cause(lines: Iterable[str]) -> str:
    """The first line that tells of an error, the last where none does."""
    told = [line.strip() for line in lines if line.strip()]
    return next((line for line in told if re.search(r"error", line, re.IGNORECASE)), told[-1] if told else "no output")


def last_line(text: str) -> str:
    """Of what a program said."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")


def install(libraries: Iterable[Path], packages: Path, version: str) -> None:
    """Put the libraries among the toolchain's packages, all or none, as a package of that version."""
    beside, final = packages / f".{PACKAGE}", packages / PACKAGE
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    for library in libraries:
        shutil.copy2(library, beside / library.name, follow_symlinks=False)
    shutil.rmtree(final, ignore_errors=True)
    beside.rename(final)
    for old in packages.glob(f"{PACKAGE}-*.dist-info"):
        shutil.rmtree(old)
    about = packages / f"{PACKAGE}-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE.replace('_', '-')}\nVersion: {version}\n")


if __name__ == "__main__":
    sys.exit(main())
