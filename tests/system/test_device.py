"""Where a model lives: one rule, told to children, and refused in one line where it cannot be kept."""

from __future__ import annotations

import dataclasses
from threading import Thread

import pytest

from featherweight.errors import RecipeError, ToolchainError
from featherweight.system import device
from featherweight.system.gpu import Gpu
from featherweight.system.machine import describe

ELSEWHERE = dataclasses.replace(describe(), cpu_model="another", gpus=(Gpu("NVIDIA H100", 80 * 2**30),))
BARE = dataclasses.replace(ELSEWHERE, gpus=())


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(device.VARIABLE)


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine with a GPU, and a torch that reaches it as far as anybody asks."""
    monkeypatch.setattr(device, "gpus", lambda: ELSEWHERE.gpus)
    monkeypatch.setattr(device, "_torch_has_cuda", lambda: True)


@pytest.mark.parametrize(
    ("wanted", "machine", "found"),
    [("auto", ELSEWHERE, "cuda"), ("cpu", ELSEWHERE, "cpu"), ("cuda", ELSEWHERE, "cuda"), ("auto", BARE, "cpu")],
)  # fmt: skip
def test_auto_is_the_gpu_where_there_is_one(wanted, machine, found):
    assert device.resolve(wanted, machine) == found


def test_a_gpu_that_is_not_there_is_refused_in_one_line():
    with pytest.raises(
        ToolchainError, match="device: cuda cannot be had: that machine has no CUDA GPU; say device: cpu"
    ) as refused:
        device.resolve("cuda", BARE)
    assert "\n" not in str(refused.value)


def test_a_torch_for_cpus_reaches_no_gpu(monkeypatch, with_gpu):
    assert device.resolve() == "cuda"
    monkeypatch.setattr(device, "_torch_has_cuda", lambda: False)
    assert device.resolve() == "cpu"
    with pytest.raises(ToolchainError, match="is built for CPUs only"):
        device.resolve("cuda")


def test_the_build_of_torch_is_known_without_importing_it():
    import torch

    assert device._torch_has_cuda() == (torch.version.cuda is not None)


def test_the_environment_says_what_auto_is(monkeypatch):
    monkeypatch.setenv(device.VARIABLE, "cpu")
    assert device.resolve("auto", ELSEWHERE) == "cpu" and device.resolve("cuda", ELSEWHERE) == "cuda"
    monkeypatch.setenv(device.VARIABLE, "CUDA")
    with pytest.raises(ToolchainError, match="cannot be had"):
        device.resolve("auto", BARE)
    monkeypatch.setenv(device.VARIABLE, "gpu")
    with pytest.raises(RecipeError, match="FEATHERWEIGHT_DEVICE is 'gpu'; it takes auto, cpu, cuda"):
        device.resolve()


def test_what_is_in_use_holds_inside_and_in_children_alone(with_gpu):
    assert device.current() == "cuda" and device.told() == {device.VARIABLE: "cuda"}
    seen: list[str] = []
    with device.using("cpu"):
        other = Thread(target=lambda: seen.append(device.current()))  # another node of the flow, in a thread of its own
        other.start()
        other.join()
        with device.using(None):
            assert device.current() == "cpu"
        assert device.told() == {device.VARIABLE: "cpu"}
    assert seen == ["cuda"] and device.current() == "cuda"


def test_a_gpu_that_torch_does_not_reach_is_said_and_not_worked_around(with_gpu):
    import torch

    if torch.cuda.is_available():
        pytest.skip("torch reaches a GPU here")
    with pytest.raises(ToolchainError, match="cannot use this machine's GPU; update its driver, or say device: cpu"):
        device.place(torch.nn.Linear(1, 1))
    assert device.place(torch.nn.Linear(1, 1), "cpu").weight.device.type == "cpu"


@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_random_numbers_go_on_where_they_were(where):
    import torch

    torch.manual_seed(3)
    place = torch.device(where)
    state = device.random_state(place)
    drawn = [torch.rand(4), torch.rand(4, device=place)]
    device.set_random_state(state, place)
    assert all(torch.equal(one, other) for one, other in zip(drawn, [torch.rand(4), torch.rand(4, device=place)], strict=True))
    assert (device.peak_bytes(place) is None) == (where == "cpu")


@pytest.mark.parametrize("told", ["auto", "0", "-1", "two", "²"])
def test_a_share_of_a_machine_is_a_number_from_one_on(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(device.SIDE_BY_SIDE, told)
    with pytest.raises(RecipeError, match=r"takes how many stages share a machine, from 1 on$"):
        device.stages_side_by_side()
