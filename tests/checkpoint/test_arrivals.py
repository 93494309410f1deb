"""Arrivals: which checkpoints are there, whole, at rest and taken, and that each is known by its content alone."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from featherweight.checkpoint import arrivals as arriving
from featherweight.checkpoint.arrival import Arrival
from featherweight.checkpoint.arrivals import Seen, arrivals, look
from featherweight.checkpoint.files import INDEX, WEIGHTS, Listing
from featherweight.checkpoint.gguf_parts import parts_of
from featherweight.checkpoint.identity import content_identity
from featherweight.checkpoint.s3_prefix import fetch_s3
from featherweight.checkpoint.spec import LoadSpec
from featherweight.checkpoint.training_runs import Policy, numbered
from featherweight.errors import CheckpointError, DataError, RecipeError, ServiceError
from featherweight.progress import Progress
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture
def drop(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """A watched folder with one checkpoint, `one`."""
    shutil.copytree(tiny_checkpoint, tmp_path / "drop" / "one")
    return tmp_path / "drop"


@pytest.fixture
def see(tmp_path: Path) -> Callable[..., dict[str, Seen]]:
    """Look at a place without waiting long; what was seen by the last part of its name."""

    def looked(source: Path | str, take: str = "every", settle_s: float = 0.02) -> dict[str, Seen]:
        seen = look(str(source), tmp_path / "notes", settle_s, Policy.of(take).taken)
        return {one.source.rpartition("/")[2]: one for one in seen}

    return looked


def in_two(folder: Path) -> None:
    """The same tensors in two shards and an index."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {name: file for file, part in shards.items() for name in part}}))


def flip(path: Path) -> None:
    """Another value in the last tensor, nothing else: neither size nor times."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def steps(drop: Path, losses: dict[int, float]) -> None:
    """A training run as transformers' Trainer leaves it, from the checkpoint `one`."""
    history = [{"step": step, "eval_loss": loss} for step, loss in losses.items()]
    for step in losses:
        shutil.copytree(drop / "one", drop / f"checkpoint-{step}")
        state = {"global_step": step, "log_history": [entry for entry in history if entry["step"] <= step]}
        (drop / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))


def test_the_same_content_is_the_same_checkpoint(drop: Path, see) -> None:
    first = see(drop)["one"]
    assert first.state == "ready" and len(first.identity) == 64
    (drop / "one" / "optimizer.pt").write_bytes(b"moments")
    (drop / "one" / "config.json").touch()
    shutil.copytree(drop / "one", drop / "deep" / "copy")
    in_two(shutil.copytree(drop / "one", drop / "sharded"))
    (drop / "sharded" / "model-00001-of-00003.safetensors").write_bytes(b"of an older save")
    assert {name: one.identity for name, one in see(drop).items()} == dict.fromkeys(("one", "copy", "sharded"), first.identity)


@pytest.mark.parametrize("change", [WEIGHTS, "tokenizer.json", "config.json"])
def test_other_content_is_another_checkpoint(drop: Path, see, change: str) -> None:
    first = see(drop)["one"].identity
    if change == WEIGHTS:
        flip(drop / "one" / change)
    else:
        tree = json.loads((drop / "one" / change).read_text())
        (drop / "one" / change).write_text(json.dumps({**tree, "changed": True}))
    assert see(drop)["one"].identity not in ("", first)


def test_content_is_read_once(drop: Path, see, monkeypatch: pytest.MonkeyPatch) -> None:
    first = see(drop)["one"].identity

    def never(*_: object) -> str:
        raise AssertionError("read again")

    monkeypatch.setattr(arriving, "content_identity", never)
    (drop / "one" / "optimizer.pt").write_bytes(b"moments")
    assert see(drop)["one"].identity == first


def test_one_that_is_being_copied_waits_until_it_is_whole_and_at_rest(drop: Path, see, tiny_checkpoint: Path) -> None:
    """File by file, in any order, each half at first: ready only when all are there."""
    place = drop / "two"
    place.mkdir()
    files = sorted(tiny_checkpoint.iterdir(), key=lambda path: path.name != "config.json")
    for path in files:
        content = path.read_bytes()
        (place / path.name).write_bytes(content[: len(content) // 2])
        assert see(drop)["two"].state == "waiting"
        (place / path.name).write_bytes(content)
    assert see(drop)["two"].identity == see(drop)["one"].identity


def test_one_that_grows_between_two_looks_waits(drop: Path, see, monkeypatch: pytest.MonkeyPatch) -> None:
    growing = drop / "one" / "tokenizer_config.json"
    content = growing.read_text()
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(arriving, "time", SimpleNamespace(sleep=lambda _: growing.write_text(content + "\n")))
        assert "being written" in see(drop)["one"].reason
    assert see(drop)["one"].state == "ready"


def test_the_trainers_word_that_it_is_done_saves_the_second_look(drop: Path, see, monkeypatch: pytest.MonkeyPatch) -> None:
    (drop / "one" / "trainer_state.json").write_text("{}")
    waits: list[float] = []
    monkeypatch.setattr(arriving, "time", SimpleNamespace(sleep=waits.append))
    assert see(drop, settle_s=30)["one"].state == "ready"
    assert waits == []


@pytest.mark.parametrize("depth", [3, 100_000])
def test_nonsense_costs_itself_only(drop: Path, see, depth: int) -> None:
    shutil.copytree(drop / "one", drop / "bad")
    (drop / "bad" / "config.json").write_text("[" * depth)
    shutil.copytree(drop / "one", drop / "worse")
    header = b'{"a": {"data_offsets": [0, 0]}}'
    (drop / "worse" / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)
    seen = see(drop)
    assert seen["one"].state == "ready"
    assert {seen["bad"].state, seen["worse"].state} == {"waiting"}
    assert "is not JSON" in seen["bad"].reason and "safetensors header" in seen["worse"].reason


def test_links_do_not_lead_out(drop: Path, see, tmp_path: Path) -> None:
    outside = shutil.copytree(drop / "one", tmp_path / "outside")
    (drop / "linked").symlink_to(outside)
    shutil.copytree(drop / "one", drop / "peeking")
    (drop / "peeking" / "tokenizer.json").unlink()
    (drop / "peeking" / "tokenizer.json").symlink_to(outside / "tokenizer.json")
    blobs = drop / ".blobs"
    blobs.mkdir()
    shutil.copytree(drop / "one", drop / "cache")
    (drop / "cache" / WEIGHTS).rename(blobs / "abc")
    (drop / "cache" / WEIGHTS).symlink_to(blobs / "abc")
    seen = see(drop)
    assert {name: one.state for name, one in seen.items()} == {"one": "ready", "peeking": "left out", "cache": "ready"}
    assert "leads out" in seen["peeking"].reason


def test_an_adapter_is_an_arrival(drop: Path, see) -> None:
    from safetensors.torch import save_file
    from torch import ones

    adapter = drop / "lora"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(drop / "one")}))
    assert "adapter_model.safetensors" in see(drop)["lora"].reason
    save_file({"a": ones(2, 2)}, adapter / "adapter_model.safetensors")
    assert see(drop)["lora"].state == "ready"


def test_an_adapter_whose_base_changed_under_the_same_name_is_another_arrival(tmp_path: Path, drop: Path, see) -> None:
    from safetensors.torch import load_file, save_file
    from torch import ones

    base, adapter = Path(shutil.move(drop / "one", tmp_path / "base")), drop / "lora"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "../../base"}))
    save_file({"a": ones(2, 2)}, adapter / "adapter_model.safetensors")
    first = see(drop)["lora"].identity
    (base / "optimizer.pt").write_bytes(b"x")
    os.utime(base / WEIGHTS)
    assert see(drop)["lora"].identity == first
    tensors = load_file(base / WEIGHTS)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, base / WEIGHTS, {"format": "pt"})
    assert len({first, see(drop)["lora"].identity, ""}) == 3
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": 5}))
    assert see(drop)["lora"].state in ("ready", "waiting")


def test_gguf_files_are_arrivals(s3_server, drop: Path, see, tiny_checkpoint: Path) -> None:
    """Whole by their headers and their own count of parts; known by their tensors, however split and wherever they lie."""
    from tests.support.gguf_files import write_gguf

    place = drop / "llama"
    place.mkdir()
    parts = write_gguf(place / "split.gguf", tiny_checkpoint, parts=3)
    write_gguf(place / "whole.gguf", tiny_checkpoint)
    write_gguf(place / "cut.gguf", tiny_checkpoint)
    (place / "cut.gguf").write_bytes((place / "whole.gguf").read_bytes()[:-100])
    (place / "nonsense.gguf").write_bytes(b"GGUF" + b"\xff" * 40)
    write_gguf(drop / "one" / "beside.gguf", tiny_checkpoint)  # of a checkpoint that is there as safetensors
    parts[1].rename(drop / "kept")
    seen, first = see(drop), "split-00001-of-00003.gguf"
    waiting = {name: one.reason for name, one in seen.items() if one.state == "waiting"}
    assert set(seen) == {"one", first, "whole.gguf", "cut.gguf", "nonsense.gguf"}
    assert set(waiting) == {first, "cut.gguf", "nonsense.gguf"}
    assert "2 of 3 parts" in waiting[first] and "truncated" in waiting["cut.gguf"] and "GGUF" in waiting["nonsense.gguf"]
    (drop / "kept").rename(parts[1])
    shutil.copytree(place, s3_server.folder / "llama")
    there = see(f"s3://{s3_server.bucket}")
    assert see(drop)[first].identity == seen["whole.gguf"].identity == there["whole.gguf"].identity == there[first].identity
    assert there[first].source == f"s3://{s3_server.bucket}/llama/{first}"
    fetched = fetch_s3(LoadSpec(source=there[first].source), drop / ".work", Progress())
    assert [part.name for part in parts_of(fetched)] == [part.name for part in parts]
    before = seen["whole.gguf"].identity
    flip(place / "whole.gguf")
    assert see(drop)["whole.gguf"].identity not in ("", before)


def test_which_of_a_training_run_are_taken(drop: Path, see) -> None:
    steps(drop, {500: 3.0, 1000: 1.5, 1500: 1.5})  # of equals the first
    assert set(see(drop)) == {"one", "checkpoint-500", "checkpoint-1000", "checkpoint-1500"}
    assert set(see(drop, "every:1000")) == {"one", "checkpoint-1000"}
    assert set(see(drop, "best")) == {"one", "checkpoint-1000"}
    assert set(see(drop, "best:eval_bleu")) == {"one"}
    for words in ("some", "every:0", "every:x"):
        with pytest.raises(RecipeError, match=r"every:N"):
            Policy.of(words)


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("a/step-1000", ("a/step-", 1000)),
        ("s3://b/run/global_step20/", ("s3://b/run/global_step", 20)),
        ("a/llama-3-8b", None),
        ("runs/2026", None),
        ("models:/m/3", None),
    ],
)
def test_numbers_in_names(source: str, place: tuple[str, int] | None) -> None:
    assert numbered(source) == place


def test_a_missing_folder_is_an_error_and_a_vanishing_one_is_not(drop: Path, see, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="does not exist"):
        arrivals(str(drop / "nowhere"))

    def vanish(listing: Listing) -> str:
        shutil.rmtree(drop / "one")
        return content_identity(listing)

    monkeypatch.setattr(arriving, "content_identity", vanish)
    assert see(drop)["one"].state == "waiting"


def test_a_prefix_of_s3(s3_server, drop: Path, see, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same content has the same identity there; a server that went away is an error, and nothing is forgotten."""
    here = see(drop)["one"].identity
    place = s3_server.folder / "run"
    shutil.copytree(drop / "one", place / "step-1")
    shutil.copytree(drop / "one", place / "step-2", ignore=shutil.ignore_patterns(WEIGHTS))
    seen = see(f"s3://{s3_server.bucket}/run")
    assert {name: one.state for name, one in seen.items()} == {"step-1": "ready", "step-2": "waiting"}
    assert seen["step-1"].identity == here
    assert seen["step-1"].source == f"s3://{s3_server.bucket}/run/step-1"
    with monkeypatch.context() as away, pytest.raises(ServiceError):
        away.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        see(f"s3://{s3_server.bucket}/run")
    assert see(f"s3://{s3_server.bucket}/run/step-1")["step-1"].identity == here


def test_the_versions_of_a_registered_model(drop: Path, see, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.support.stores import new_workspace

    workspace = new_workspace(tmp_path / "workspace")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", workspace.tracking_uri)
    client = workspace.client()
    client.create_registered_model("trained")
    client.create_model_version("trained", (drop / "one").as_uri())
    client.create_model_version("trained", (drop / "nothing").as_uri())
    client.create_model_version("trained", (drop / "one").as_uri(), tags={"featherweight.stage": "none"})
    seen = see("models:/trained")
    assert {one.source: one.state for one in seen.values()} == {"models:/trained/1": "ready", "models:/trained/2": "waiting"}
    assert seen["1"].identity == see(drop)["one"].identity
    with pytest.raises(CheckpointError, match="models:/NAME"):
        arrivals("models:/trained/1")


def test_an_arrival_without_files_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arriving, "arrivals", lambda source: [Arrival("x", "stamp")])
    (seen,) = look("x", tmp_path, 0)
    assert seen.state == "waiting" and "no files" in seen.reason


def test_what_cannot_be_listed_costs_itself_only(drop: Path, see, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name beyond any file system, a count of no parts, a state of numbers, offsets of text, 20 GiB of JSON, a closed folder."""
    adapter = drop / "far"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "a" * 100_000}))
    shutil.copy(drop / "one" / WEIGHTS, adapter / "adapter_model.safetensors")
    (drop / "gguf").mkdir()
    (drop / "gguf" / "none-00000-of-00000.gguf").write_bytes(b"")
    shutil.copytree(drop / "one", drop / "checkpoint-1")
    (drop / "checkpoint-1" / "trainer_state.json").write_text('{"log_history": 5}')
    shutil.copytree(drop / "one", drop / "offsets")
    header = b'{"a": {"data_offsets": ["0", 8], "shape": [2], "dtype": "F32"}}'
    (drop / "offsets" / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    shutil.copytree(drop / "one", drop / "huge")
    os.truncate(drop / "huge" / "config.json", 20 * 2**30)
    (drop / "closed").mkdir()
    scan = os.scandir

    def refuse(path: str) -> object:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    seen = see(drop, "best")
    assert seen["one"].state == "ready" and "checkpoint-1" not in seen
    assert seen["far"].state == seen["closed"].state == "left out"
    assert seen["huge"].reason.endswith("config.json has 21,474,836,480 bytes; none is so large; copy it again")
    assert "too long" in seen["far"].reason and "Permission denied" in seen["closed"].reason
    assert "GGUF" in seen["none-00000-of-00000.gguf"].reason and "safetensors header" in seen["offsets"].reason


def test_kinds_of_sources_know_nothing_of_how_all_are_looked_at() -> None:
    """Who finds arrivals imports what one is; the list of the kinds stands above them."""
    kinds = ("hub", "local_folder", "registered_model", "s3_prefix", "training_runs")
    texts = [(ROOT / "featherweight" / "checkpoint" / f"{kind}.py").read_text() for kind in kinds]
    assert not [kind for kind, text in zip(kinds, texts, strict=True) if "checkpoint.arrivals" in text]
