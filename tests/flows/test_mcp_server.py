"""The MCP server: what it offers, that it answers as the commands do, and that nothing is changed by it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.mcp_server import Reading, server
from tests.support.paths import ROOT
from tests.support.registering import MODEL, Bench, desk

pytestmark = pytest.mark.slow
mcp = pytest.importorskip("mcp")

__all__ = ["desk"]
RECIPE = str(ROOT / "recipes" / "demo.yaml")


def asked(root: Path, *calls: tuple[str, dict[str, Any]]) -> tuple[Any, list[Any]]:
    """The tools, and what each call answers."""

    async def ask() -> tuple[Any, list[Any]]:
        async with mcp.Client(server(root)) as client:
            return (await client.list_tools()).tools, [await client.call_tool(name, told) for name, told in calls]

    return asyncio.run(ask())


def test_it_reads_what_the_commands_read_and_changes_nothing(desk: Bench) -> None:
    desk.registry.register(desk.winner("a/torch"))
    desk.registry.client.set_registered_model_alias(MODEL, "champion", "1")  # by hand, which a command would undo
    before = desk.state()
    calls = [("plan", {"recipe": RECIPE, "overrides": ["variants=[{serve: ort}]"]}), ("lineage", {"model": f"{MODEL}/1"})]
    tools, answers = asked(
        desk.root, *calls, ("audit", {"model": MODEL}), ("next_step", {}), ("variants", {}), ("plan", {"recipe": "absent.yaml"})
    )
    assert {tool.name for tool in tools} == {name for name in vars(Reading) if not name.startswith("_")}
    assert all(tool.annotations.read_only_hint and tool.description for tool in tools)
    plan, lineage, audit, step, nothing, absent = answers
    assert json.loads(plan.content[0].text)["variants"] == ["baseline", "ort"]
    assert json.loads(lineage.content[0].text)["graph"]["variant"] == "a/torch"
    assert json.loads(audit.content[0].text)["findings"] and "featherweight" in step.content[0].text
    assert nothing.is_error and "no finished optimization" in nothing.content[0].text
    assert absent.is_error and "cannot read recipe absent.yaml" in absent.content[0].text
    assert desk.state() == before


def test_where_nothing_was_optimized_it_makes_nothing(tmp_path: Path) -> None:
    place = tmp_path / "mistyped"
    looks = [("audit", {"model": "m"}), ("lineage", {"model": "m"}), ("variants", {})]
    _, (plan, *answers) = asked(place, ("plan", {"recipe": "recipes/demo.yaml"}), *looks)
    assert "ort" in json.loads(plan.content[0].text)["variants"], "a recipe that is brought along goes by its name"
    assert all("nothing was optimized yet" in answer.content[0].text for answer in answers)
    assert not place.exists()


def test_it_speaks_over_standard_input_and_output(tmp_path: Path) -> None:
    async def ask() -> Any:
        command = [sys.executable, "-m", "flows.cli", "mcp", "-w", str(tmp_path)]
        told = mcp.StdioServerParameters(command=command[0], args=command[1:], env=dict(os.environ))
        async with mcp.Client(told) as client:
            return await client.call_tool("next_step", {})

    assert "featherweight --help" in asyncio.run(ask()).content[0].text


def test_it_ends_quietly_when_its_client_dies_unanswered(tmp_path: Path) -> None:
    about = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "dies", "version": "1"}}
    begin = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": about}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-m", "flows.cli", "mcp", "-w", str(tmp_path)], text=True, **pipes) as process:
        assert process.stdin and process.stdout and process.stderr
        print(json.dumps(begin), file=process.stdin, flush=True)
        assert '"serverInfo"' in process.stdout.readline()
        process.stdout.close()
        print(json.dumps({"jsonrpc": "2.0", "id": 2, "method": "ping"}), file=process.stdin, flush=True)
        process.stdin.close()
        assert (process.wait(120), process.stderr.read()) == (0, "")
