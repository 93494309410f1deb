"""MLflow's client without the rest of MLflow, for commands that read a registry and end."""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

from featherweight.system.lighter_imports import nothing_collected

JUDGES = "mlflow.genai"
NO_CLIENTS = ("numpy", "pandas", "scipy", "mlflow.gateway", JUDGES)
COMMAND_LINE = "httpx._main"


class OfMlflowItsClient(importlib.abc.MetaPathFinder):
    """Lets MLflow find, while it is imported, no library for data frames, and nothing that judges or serves.

    It does without the first where mlflow-skinny is installed. All of it is there for whoever imports it later. httpx's command
    line, without which httpx does too, brings in what colours a terminal.
    """

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """MLflow with a stand-in; none for all others. Raises ModuleNotFoundError for what is left out."""
        if fullname == COMMAND_LINE or (fullname in NO_CLIENTS and _begun("mlflow")):
            raise ModuleNotFoundError(f"{fullname} is not needed here", name=fullname)
        found = PathFinder.find_spec(fullname, path) if fullname == "mlflow" else None
        if found is not None:
            found.loader = _WithoutJudges(found.name, str(found.origin))
        return found


class _WithoutJudges(SourceFileLoader):
    """Imports MLflow, which asks for its judges, with a stand-in in their place."""

    def exec_module(self, module: ModuleType) -> None:
        setattr(module, JUDGES.rpartition(".")[2], _Later(JUDGES))
        with nothing_collected():
            super().exec_module(module)


class _Later(ModuleType):
    """Stands in for a module until it is used."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


def _begun(name: str) -> bool:
    """Whether a module is being imported at this moment."""
    return bool(getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False))


def for_reading() -> None:
    """Of MLflow import its client alone, in a process that reads a registry and ends."""
    if "mlflow" not in sys.modules:
        sys.meta_path.insert(0, OfMlflowItsClient())
