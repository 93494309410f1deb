"""Keys and what they sign: every file of a version, which version it is, and each entry of the history."""

from __future__ import annotations

import importlib.util
import stat
import sys
from pathlib import Path

import pytest

from featherweight.errors import Forbidden, GateError, IntegrityError
from featherweight.registry.attestation import attested, folder_faults, require_signed
from featherweight.registry.auditing import audit_model
from featherweight.registry.commit import placed
from featherweight.registry.gate import GatesRefused
from featherweight.registry.history import History
from featherweight.registry.keys import Keys
from featherweight.registry.lineage import from_registry, verify
from featherweight.registry.mlflow_store import ENTRY, SIGNED, SOURCE
from featherweight.registry.out_of_band import look
from featherweight.registry.promotion import gated_transition
from featherweight.registry.witness import seen_from_here
from featherweight.spec import HISTORY_SUFFIX
from featherweight.store.workspace import Workspace, local_path
from flows.audit import audit_registry
from tests.support.registering import MODEL, Bench, desk

pytestmark = pytest.mark.slow

__all__ = ["desk"]


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Keys:
    monkeypatch.setenv("FEATHERWEIGHT_KEYS", str(tmp_path / "keys"))
    made = Keys.here()
    made.make()
    return made


def test_a_key_pair_is_its_owners_alone_and_never_replaced(keys: Keys) -> None:
    assert stat.S_IMODE((keys.folder / "private.pem").stat().st_mode) == 0o600
    with pytest.raises(GateError, match=r"private\.pem is there already"):
        keys.make()
    signature = keys.sign("entry")
    assert keys.signed("entry", signature)
    assert not keys.signed("Entry", signature)
    assert not keys.signed("entry", "no base64!")
    assert not keys.signed("entry", "")


def test_keys_that_are_none_or_were_torn_apart_are_told_in_a_line(keys: Keys) -> None:
    whole = (keys.folder / "private.pem").read_bytes()
    for garbage in (b"", b"\xff\x00", (keys.folder / "public.pem").read_bytes()):
        (keys.folder / "private.pem").write_bytes(garbage)
        with pytest.raises(IntegrityError, match=r"private\.pem is no readable key"):
            keys.sign("entry")
    (keys.folder / "private.pem").write_bytes(whole)
    (keys.folder / "public.pem").unlink()
    with pytest.raises(
        IntegrityError, match=r"public\.pem is missing, without which one's own signatures are not trusted: openssl"
    ):
        keys.signed("entry", "")


def test_who_has_no_key_decides_nothing_where_entries_are_signed(desk: Bench, keys: Keys, tmp_path: Path) -> None:
    """Told success, they would stop the model for all who trust keys."""
    for name in ("one", "two"):
        desk.registry.register(desk.winner(name))
    desk.registry.transition(MODEL, "1", "production", who="ada", why="good")
    before = desk.state()
    private = (keys.folder / "private.pem").rename(tmp_path / "away.pem")
    with pytest.raises(Forbidden, match=r"entries of 'little-llama' are signed; one of this user, who has no key"):
        desk.registry.transition(MODEL, "2", "production", who="eve", why="better")
    with pytest.raises(GateError, match=r"public\.pem is there already, without its private key; move it into"):
        keys.make()
    assert desk.state() == before
    private.rename(keys.folder / "private.pem")
    assert desk.registry.transition(MODEL, "2", "production", who="ada", why="better").stage == "production"


@pytest.mark.parametrize("text", [b"", b"\xff\x00", b"[" * 100_000, b"[]", b"7", b"null", b'{"1": 7}', b'{"1": ["2"]}', None])
def test_a_witness_that_is_none_is_told_in_a_line(keys: Keys, text: bytes | None) -> None:
    path = keys.folder / "witness.json"
    path.mkdir() if text is None else path.write_bytes(text)
    with pytest.raises(IntegrityError, match=r"witness\.json was altered: restore it, or remove it"):
        seen_from_here(1, History(), keys)


def test_another_key_is_trusted_once_it_lies_there(keys: Keys, tmp_path: Path) -> None:
    other = Keys(tmp_path / "other")
    public, signature = other.make(), other.sign("entry")
    assert not keys.signed("entry", signature)
    (keys.folder / "trusted").mkdir()
    (keys.folder / "trusted" / "ada.pem").write_bytes(public.read_bytes())
    assert keys.signed("entry", signature)


def test_every_file_is_covered_and_each_that_differs_is_named(desk: Bench, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    version = desk.registry.register(desk.winner())
    folder = local_path(version.source)
    assert folder is not None
    assert folder_faults(folder, keys) == {}
    (folder / "registered_model_meta").write_text("what MLflow writes when it loads a version")
    assert folder_faults(folder, keys) == {}
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    covered = [name for name in names if name not in ("model.sig", "registered_model_meta")]
    assert {"MLmodel", "pyfunc_model.py", "requirements.txt", "python_env.yaml", "lineage.json"} < set(covered)
    for name in covered:
        whole = (folder / name).read_bytes()
        (folder / name).unlink()
        assert folder_faults(folder, keys) == {name: "missing"}
        (folder / name).write_bytes(whole + b" ")
        assert folder_faults(folder, keys) == {name: "altered"}
        (folder / name).write_bytes(whole)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    spec = importlib.util.spec_from_file_location("as_mlflow_loads_it", folder / "pyfunc_model.py")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert folder_faults(folder, keys) == {}, "loading leaves nothing behind, byte code least of all"
    (folder / "__pycache__").unlink()
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "pyfunc_model.cpython-311.pyc").write_bytes(b"code")
    said = r"is not what was signed: __pycache__ \(missing\), __pycache__/pyfunc_model.cpython-311.pyc \(foreign\)"
    with pytest.raises(IntegrityError, match=said):
        require_signed(folder, keys)


def test_a_signature_that_is_gone_or_of_another_key_vouches_for_nothing(desk: Bench, keys: Keys, tmp_path: Path) -> None:
    version = desk.registry.register(desk.winner())
    folder = local_path(version.source)
    assert folder is not None
    other = Keys(tmp_path / "other")
    other.make()
    assert "no trusted key signed it" in folder_faults(folder, other)["model.sig"]
    (folder / "model.sig").write_text("{}")
    assert "no trusted key signed it" in folder_faults(folder, keys)["model.sig"]
    (folder / "model.sig").unlink()
    assert "nobody signed these files" in folder_faults(folder, keys)["model.sig"]
    require_signed(folder, Keys(tmp_path / "none"))  # where no key is trusted, nothing is asked for


def test_promotion_and_verification_look_at_the_flavours_own_files(desk: Bench, keys: Keys) -> None:
    version = desk.registry.register(desk.winner())
    assert {one.state for one in verify(from_registry(desk.registry, MODEL, "1"), desk.registry)} == {"ok"}
    code = Path(str(local_path(version.source))) / "pyfunc_model.py"
    code.write_text("import os  # and whatever an attacker likes\n" + code.read_text())
    found = {one.part: one.state for one in verify(from_registry(desk.registry, MODEL, "1"), desk.registry)}
    assert (found["file pyfunc_model.py"], found["registered files"]) == ("altered", "ok")
    with pytest.raises(GatesRefused, match=r"not what was signed: pyfunc_model\.py \(altered\)"):
        gated_transition(desk.registry, MODEL, "1", who="eve", why="x")


def test_a_version_is_attested_by_number_model_and_files(desk: Bench, keys: Keys) -> None:
    version = desk.registry.register(desk.winner())
    born = desk.registry.model(MODEL).born
    assert attested(version, born, keys)
    client = desk.registry.client
    client.create_model_version(MODEL, version.source, version.run_id, tags=dict(version.tags), await_creation_for=0)
    copied = desk.registry.get(MODEL, "2")
    assert copied.tags == version.tags
    assert not attested(copied, born, keys)
    client.set_model_version_tag(MODEL, "1", "featherweight.lineage", "0" * 64)
    assert not attested(desk.registry.get(MODEL, "1"), born, keys)


def test_entries_are_signed_as_they_are_written(desk: Bench, keys: Keys) -> None:
    desk.registry.register(desk.winner())
    desk.registry.transition(MODEL, "1", "production", who="ada", why="first")
    ((text, signature),) = desk.registry.entry_signatures(MODEL).values()
    assert keys.signed(text, signature)
    assert not keys.signed(text.replace("ada", "eve"), signature)


def written(desk: Bench, who: str, keys: Keys | None = None) -> None:
    """An entry that makes version 2 champion, as anybody can write it into MLflow, signed with these keys."""
    client, seen = desk.registry.client, desk.registry.model(MODEL)
    entry = placed(seen.transition(seen.pick("2"), "production", who, "looks right", ()), seen.history).to_json()
    tags = {ENTRY: entry, **({SIGNED: keys.sign(entry)} if keys else {})}
    client.create_model_version(f"{MODEL}{HISTORY_SUFFIX}", SOURCE, tags=tags, await_creation_for=0)


def test_an_entry_that_no_trusted_key_signed_decides_nothing(desk: Bench, keys: Keys) -> None:
    for name in ("one", "two"):
        desk.registry.register(desk.winner(name))
    desk.registry.transition(MODEL, "1", "production", who="ada", why="first")
    written(desk, "ada")
    desk.registry.client.set_registered_model_alias(MODEL, "champion", "2")
    desk.registry.client.delete_model_version_tag(f"{MODEL}{HISTORY_SUFFIX}", "1", SIGNED)  # as if none had ever been signed
    assert desk.registry.model(MODEL).unvouched == (2,)
    with pytest.raises(IntegrityError, match="history entry 2 is signed by no key that is trusted here; nothing is decided on it"):
        desk.registry.transition(MODEL, "2", "archived", who="ada", why="x")
    assert look(desk.registry, MODEL, settle_s=0)[1] is None
    wrong = [one.reason for one in audit_model(desk.registry, MODEL) if one.state != "ok"]
    assert any("history entry 2 is signed by no key" in reason for reason in wrong)
    repaired = audit_registry(Workspace.at(desk.root), MODEL, True)
    assert any("entry 2 is out" in line for line in repaired.repaired)
    seen = desk.registry.model(MODEL)
    assert (seen.aliases["champion"], seen.shown["champion"], seen.unvouched) == ("1", "1", ())
    desk.registry.transition(MODEL, "2", "production", who="ada", why="indeed")


def test_an_entry_of_a_colleague_decides_once_their_key_is_trusted(desk: Bench, keys: Keys, tmp_path: Path) -> None:
    for name in ("one", "two"):
        desk.registry.register(desk.winner(name))
    desk.registry.transition(MODEL, "1", "production", who="ada", why="first")
    colleague = Keys(tmp_path / "colleague")
    public = colleague.make()
    written(desk, "bob", colleague)
    assert desk.registry.model(MODEL).unvouched == (2,)
    (keys.folder / "trusted").mkdir()
    (keys.folder / "trusted" / "bob.pem").write_bytes(public.read_bytes())
    assert desk.registry.rollback(MODEL, "ada", "back").version == "1"


def test_a_signed_folder_under_another_number_is_not_promoted(desk: Bench, keys: Keys) -> None:
    first = desk.registry.register(desk.winner())
    client = desk.registry.client
    client.create_registered_model("other", {"featherweight.name": "other"})
    for model in (MODEL, "other"):
        client.create_model_version(model, first.source, first.run_id, tags=dict(first.tags), await_creation_for=0)
    for model, version in ((MODEL, "2"), ("other", "1")):
        with pytest.raises(GatesRefused, match="no trusted key attests that it is what it says"):
            gated_transition(desk.registry, model, version, who="eve", why="x")


def test_a_model_that_takes_a_renamed_ones_place_is_not_registered_to(desk: Bench) -> None:
    """It would have no champion to beat."""
    desk.registry.register(desk.winner())
    desk.registry.client.rename_registered_model(MODEL, "hidden")
    desk.registry.client.create_registered_model(MODEL)
    with pytest.raises(GateError, match="was renamed to 'hidden' in MLflow"):
        desk.registry.register(desk.winner("two"))


def test_a_model_without_its_name_tag_is_still_held_to_its_history(desk: Bench) -> None:
    desk.registry.register(desk.winner())
    desk.registry.transition(MODEL, "1", "production", who="ada", why="first")
    desk.registry.register(desk.winner("two"))
    desk.registry.client.delete_registered_model_tag(MODEL, "featherweight.name")
    desk.registry.client.set_registered_model_alias(MODEL, "champion", "2")
    found = look(desk.registry, MODEL, settle_s=0)[1]
    assert found is not None
    assert found.outcome == "undone"
