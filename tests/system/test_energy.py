"""Energy: counters as Linux' powercap and NVIDIA's driver lay them out."""

from __future__ import annotations

from pathlib import Path

import pytest

from featherweight.system.energy import EnergyMeter
from tests.support.nvml import Card, FakeNvml


@pytest.fixture
def powercap(tmp_path: Path) -> Path:
    """Two processors, a part of the first, and the whole platform, which would be counted twice."""
    for folder, name in (("intel-rapl:0", "package-0"), ("intel-rapl:1", "package-1"), ("intel-rapl:2", "psys")):
        (tmp_path / folder / f"{folder}:0").mkdir(parents=True)
        (tmp_path / folder / "name").write_text(f"{name}\n")
        (tmp_path / folder / "max_energy_range_uj").write_text("262143328850\n")
    count(tmp_path, 1_000_000, 262_143_000_000)
    return tmp_path


def count(root: Path, *microjoules: int) -> None:
    for index, value in enumerate(microjoules):
        (root / f"intel-rapl:{index}" / "energy_uj").write_text(f"{value}\n")


def test_the_processors_are_counted_together_and_past_the_end_of_a_counter(powercap: Path) -> None:
    meter = EnergyMeter(root=powercap)
    before = meter.read()
    count(powercap, 3_500_000, 671_150)
    assert meter.reason == ""
    assert meter.since(before) == pytest.approx(2.5 + 1.0)


def test_what_cannot_be_read_is_said(powercap: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    nowhere = EnergyMeter(root=tmp_path_factory.mktemp("nothing"))
    assert nowhere.reason.startswith("no RAPL counter under") and nowhere.since(nowhere.read()) is None
    (powercap / "intel-rapl:1" / "energy_uj").unlink()
    (powercap / "intel-rapl:1" / "energy_uj").mkdir()
    assert EnergyMeter(root=powercap).reason == "RAPL counters may be read by root alone"


def test_of_a_run_on_a_gpu_its_energy_is_counted_too(powercap: Path) -> None:
    nvml = FakeNvml(Card(millijoules=7000))
    meter = EnergyMeter("cuda", powercap, nvml)
    before = meter.read()
    nvml.cards = (Card(millijoules=9000),)
    count(powercap, 2_000_000)
    assert meter.since(before) == pytest.approx(2.0 + 1.0)
    silent = FakeNvml(Card(), fails={"nvmlDeviceGetTotalEnergyConsumption": "Not Supported"})
    assert EnergyMeter("cuda", powercap, silent).reason == "NVIDIA's driver counts no energy of these GPUs"
