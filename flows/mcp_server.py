"""`featherweight mcp`: a workspace for programs that speak the Model Context Protocol. It reads, and changes nothing."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight import __version__
from featherweight.errors import FeatherweightError, Stopped, ToolchainError, one_line
from featherweight.store.workspace import Workspace, require_used
from featherweight.system.environment import configure

if TYPE_CHECKING:
    from mcp.server.mcpserver import MCPServer

INTERRUPTED = Stopped.exit_code
HELP = (
    "Featherweight optimizes transformer checkpoints. These tools read: what a recipe would make, what the latest optimization "
    "measured, what registered versions are made of and whether all of it is still what was signed, decided and measured."
)


class Reading:
    """The tools, each the JSON of the command of its name."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def next_step(self) -> str:
        """How the folder stands that the server was started in, and which command would be next."""
        from flows.next_step import look, told

        return told(look(Path(), self._root))

    def plan(self, recipe: str, overrides: list[str] | None = None) -> dict[str, Any]:
        """What a recipe (a YAML file), or the one that is composed for a checkpoint, would make, what is ruled out and why, what it
        would take. overrides: KEY.KEY=VALUE."""
        from flows.composed import Wanted, recipe_for
        from tasks.forecast import forecast

        made = recipe_for(recipe, tuple(overrides or ()), Wanted(), self._root, told=False)
        return forecast(made, self._root).to_dict()

    def variants(self, run: str = "") -> dict[str, Any]:
        """The result of a finished optimization, of the latest where `run` (an MLflow run id) is empty: every variant's figures."""
        from tasks.summary import past_result

        return past_result(self._workspace("finished optimization"), run).to_dict()

    def lineage(self, model: str) -> dict[str, Any]:
        """What a registered version (NAME, NAME@ALIAS or NAME/NUMBER) is made of: checkpoint, data, recipe, code, every stage."""
        from flows.audit import audit

        return audit(self._workspace(f"registered model '{model}'"), model, check=False).to_dict()

    def audit(self, model: str) -> dict[str, Any]:
        """Whether everything stored of a registered model is what was signed, decided and measured. Reads every byte of it."""
        from flows.audit import audit_registry

        return audit_registry(self._workspace(f"registered model '{model}'"), model, repair=False).to_dict()

    def _workspace(self, sought: str) -> Workspace:
        require_used(self._root, sought)
        configure(self._root)
        return Workspace.at(self._root)


def serve(root: Path) -> None:
    """Serve over standard input and output until the client ends, however it does. Raises ToolchainError as `server` does.

    Ctrl-C ends it at once: a thread waits for standard input, and nothing here is half written.
    """
    made = server(root)
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    try:
        made.run("stdio")
    except* BrokenPipeError:  # the client died before it was answered
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def server(root: Path) -> MCPServer[Any]:
    """The server of a workspace. Raises ToolchainError where the package `mcp` is not installed."""
    try:
        from mcp.server.mcpserver import MCPServer
        from mcp_types import ToolAnnotations
    except ModuleNotFoundError as error:
        raise ToolchainError("the package 'mcp' is not installed: pip install 'featherweight[mcp]'") from error
    reading, made = Reading(root), MCPServer("featherweight", instructions=HELP, version=__version__, log_level="ERROR")
    for tool in (reading.next_step, reading.plan, reading.variants, reading.lineage, reading.audit):
        made.add_tool(_quietly(tool), annotations=ToolAnnotations(read_only_hint=True), structured_output=False)
    return made


def _quietly(tool: Callable[..., Any]) -> Callable[..., Any]:
    """A tool whose refusals are one line; what it prints goes to standard error, since the other speaks the protocol."""

    @functools.wraps(tool)
    def called(*arguments: Any, **named: Any) -> Any:
        from mcp.server.mcpserver.exceptions import ToolError

        try:
            with redirect_stdout(sys.stderr):
                return tool(*arguments, **named)
        except FeatherweightError as error:
            raise ToolError(one_line(error, 2000)) from error

    return called
