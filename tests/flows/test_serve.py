"""`featherweight serve`, the command, with an engine: started, asked, stopped."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest

from featherweight.registry.lineage import build
from featherweight.store.served_folder import Serving
from tests.support.registering import METRICS, MODEL, Bench, desk
from tests.support.serving_models import NEW, PROMPTS, written
from tests.support.waiting import all_end

pytestmark = [
    pytest.mark.slow,
    pytest.mark.server,
    pytest.mark.engine,
    pytest.mark.skipif("FEATHERWEIGHT_STACK" not in os.environ, reason="20 CPU seconds; FEATHERWEIGHT_STACK=1 runs it"),
]

__all__ = ["desk"]


def test_the_champion_answers_who_has_the_token_until_it_is_stopped(desk: Bench, tiny_checkpoint: Path) -> None:
    out = desk.root / "served"
    shutil.copytree(tiny_checkpoint, out, dirs_exist_ok=True)
    Serving("torch").write(out)
    ref, manifest = desk.publish(out, "served")
    graph = build([(ref, manifest)], ref.digest, variant="one", recipe="", run_id=desk.run_id, metrics=METRICS)
    desk.registry.register(replace(desk.record("one", ref, graph), max_tokens=128))
    desk.registry.transition(MODEL, "1", "production", who="ada", why="a test")
    command = [str(Path(sys.executable).with_name("featherweight")), "serve", MODEL, "-w", str(desk.root), "--port", "0", "--json"]
    environment = os.environ | {"FEATHERWEIGHT_SERVE_TOKEN": "t" * 20, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stdout
        ready = json.loads(server.stdout.readline())
        assert (ready["event"], ready["model"], ready["version"], ready["engine"]) == ("ready", MODEL, "1", "torch")
        below = psutil.Process(server.pid).children(recursive=True)
        assert any("featherweight.runtimes.worker" in " ".join(one.cmdline()) for one in below)
        assert not any("t" * 20 in " ".join([*one.cmdline(), *one.environ().values()]) for one in below)
        asked = {"inputs": PROMPTS[:2], "params": {"max_new_tokens": NEW, "stop_at_end": False}}
        where = f"{ready['url']}/invocations"
        assert httpx.post(where, json=asked, timeout=300).status_code == 401
        answer = httpx.post(where, json=asked, timeout=300, headers={"Authorization": f"Bearer {'t' * 20}"})
        assert answer.json() == {"predictions": [written(tiny_checkpoint, prompt, NEW) for prompt in PROMPTS[:2]]}
    finally:
        server.terminate()
        said, _ = server.communicate(timeout=300)
    assert (server.returncode, json.loads(said.splitlines()[-1])["event"]) == (0, "stopped")
    assert all_end(*below)
    assert list((desk.root / "serving").iterdir()) == []
