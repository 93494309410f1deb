"""Nothing that arrives is lost and nothing is optimized twice, whoever is killed and whatever S3 loses.

Real parts: Prefect's server, S3 behind a way on which a tenth of all requests is lost and that is away at times, two watchers of
which one is killed (SIGKILL) again and again while it optimizes. Only the optimization is a stand-in. FEATHERWEIGHT_ARRIVALS sets
how many arrive; `make test` takes ten.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from tests.support.faulty_s3 import Faults, faulty_way

COUNT = int(os.environ.get("FEATHERWEIGHT_ARRIVALS", "10"))
KILLS = COUNT * 3 // 10


@pytest.mark.slow
def test_each_is_optimized_once_and_none_is_lost(harness: Path, s3_server, tiny_checkpoint: Path, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    ledger.mkdir()
    faults = Faults(0.1)
    with faulty_way(s3_server.endpoint, faults) as endpoint:
        watchers = Watchers(f"s3://{s3_server.bucket}", tmp_path, ledger, endpoint)
        arriving = threading.Thread(target=drop, args=(tiny_checkpoint, s3_server.folder, faults))
        arriving.start()
        try:
            watchers.until_done(COUNT, KILLS)
        finally:
            arriving.join()
            watchers.stop()
    lines = (ledger / "log").read_text().splitlines()
    log = Counter(line.split()[0] for line in lines)
    completed = completed_by_content()
    told = f"{COUNT} arrived, {watchers.kills} kills, {faults.lost} of {faults.seen} requests lost; {dict(log)}"
    print(told)
    assert watchers.kills == KILLS and faults.lost, told
    assert len(completed) == COUNT and set(completed.values()) == {1}, told
    assert not log["overlap"] and not log["other"], told
    done = Counter(line.split()[1] for line in lines if line.startswith("end"))
    assert {content for content, times in done.items() if times > 1} <= watchers.killed, told


class Watchers:
    """Two watchers, started anew when they are killed."""

    def __init__(self, source: str, place: Path, ledger: Path, endpoint: str) -> None:
        recipe = place / "recipe.yaml"
        tree = {"name": "arrived", "checkpoint": {"source": "x"}, "data": {"source": "y"}, "promote": {"model": "arrived"}}
        recipe.write_text(yaml.safe_dump({**tree, "stages": {"export": {"ct2": {"engine": "ctranslate2"}}}}))
        self._command = [sys.executable, "-m", "tests.support.watcher", source, str(recipe), str(place / "workspace"), str(ledger)]
        self._ledger, self._random, self.kills, self._begun = ledger, random.Random(0), 0, 0
        self.killed: set[str] = set()
        from prefect.settings import get_current_settings

        self._environment = {**os.environ, "AWS_ENDPOINT_URL": endpoint, "PREFECT_API_URL": str(get_current_settings().api.url)}
        self._running = [self._start() for _ in range(2)]

    def _start(self) -> subprocess.Popen[bytes]:
        with (self._ledger / "output").open("ab") as output:
            return subprocess.Popen(self._command, env=self._environment, stdout=output, stderr=output)

    def until_done(self, count: int, kills: int) -> None:
        """Wait for `count` contents; on the way kill the one that has just begun an optimization, at random, so many times."""
        deadline = time.monotonic() + 300 + 12 * count
        while len(set(self._lines("end"))) < count or self.kills < kills:
            assert time.monotonic() < deadline, (self._ledger / "output").read_text()[-3000:]
            time.sleep(0.05)
            self._maybe_kill(kills)
            for place, process in enumerate(self._running):
                if process.poll() is not None:
                    self._running[place] = self._start()

    def _maybe_kill(self, kills: int) -> None:
        begun = self._lines("begin")
        for line in begun[self._begun :]:
            if self.kills < kills and self._random.random() < 0.6:
                victim = next((one for one in self._running if str(one.pid) == line.split()[2]), None)
                if victim is not None and victim.poll() is None:
                    time.sleep(self._random.random() * 0.3)
                    victim.send_signal(signal.SIGKILL)
                    victim.wait()
                    self.kills += 1
                    # What it worked on in the end: by the time of the kill it may have gone on to the next.
                    self.killed.add([line for line in self._lines("begin") if line.split()[2] == str(victim.pid)][-1].split()[1])
        self._begun = len(begun)

    def _lines(self, kind: str) -> list[str]:
        log = self._ledger / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [line for line in lines if line.startswith(kind)]

    def stop(self) -> None:
        """Let each finish what it does, and end."""
        (self._ledger / "stop").touch()
        for process in self._running:
            process.wait(300)


def drop(checkpoint: Path, bucket: Path, faults: Faults) -> None:
    """Checkpoints of different contents, a file at a time in a mixed order, the copy of one among them; S3 is away for a while."""
    chance = random.Random(1)
    files = [(number, path) for number in range(COUNT) for path in checkpoint.iterdir()]
    chance.shuffle(files)
    for done, (number, path) in enumerate(files):
        place = bucket / f"run-{number % 3}" / f"step-{number}" / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.name == "config.json":
            place.write_text(json.dumps({**json.loads(path.read_text()), "number": number}))
        else:
            shutil.copy(path, place)
        faults.away = len(files) // 3 < done < len(files) // 2
        time.sleep(0.06)
    faults.away = False
    shutil.copytree(bucket / "run-0" / "step-0", bucket / "copied")


def completed_by_content() -> dict[str, int]:
    """How many completed flow runs each claim has."""
    from tasks.claim_runs import ClaimRuns
    from tasks.claims import Patience

    claims = ClaimRuns("").claims(Patience(), "arrived")
    return {key: claim.count("COMPLETED") for key, claim in claims.items() if claim.tries[-1].source.startswith("s3://")}
