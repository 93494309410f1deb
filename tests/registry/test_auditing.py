"""An audit names each of many tamperings with what is registered, signed, decided and measured."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from featherweight.errors import IntegrityError, one_line
from featherweight.registry.auditing import Finding, audit_model
from featherweight.registry.keys import Keys
from featherweight.registry.lineage import LineageGraph
from featherweight.registry.mlflow_store import ENTRY, SIGNED
from featherweight.registry.registry import Measured
from featherweight.store.workspace import Workspace, local_path
from flows.audit import audit, audit_registry
from flows.comparing import compared
from flows.history import history_of
from tests.support.registering import METRICS, MODEL, Bench, desk

pytestmark = pytest.mark.slow

__all__ = ["desk"]
SIDE = f"{MODEL}.history"


@dataclass(frozen=True)
class Tampering:
    """What an attacker does, how it is undone, and what the audit has to say: the class, and words of the part or the reason."""

    name: str
    do: Callable[[], object]
    undo: Callable[[], object]
    state: str
    words: str


@pytest.fixture
def whole(desk: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Two signed versions, each champion in its turn, with figures in a run and in the logged models."""
    monkeypatch.setenv("FEATHERWEIGHT_KEYS", str(tmp_path / "keys"))
    Keys.here().make()
    for name in ("one", "two"):
        text = Measured(desk.run_id, "text/evaluation", desk.origin[1][1].digest, "a folder")
        model_id = desk.registry.log_variant(desk.run_id, name, METRICS, measured=text)
        version = desk.registry.register(desk.winner(name, model_id=model_id))
        desk.registry.transition(MODEL, version.version, "production", who="ada", why=f"{name} is good")
    desk.registry.client.log_metric(desk.run_id, "speedup_1", METRICS["speedup_1"])
    return desk


def wrong(desk: Bench) -> list[Finding]:
    return [one for one in audit_model(desk.registry, MODEL) if one.state != "ok"]


def files(desk: Bench) -> Iterator[Tampering]:
    """Every file that serving can touch, changed in four ways."""
    folder = Path(str(local_path(desk.registry.get(MODEL, "2").source)))
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, content = str(path.relative_to(folder)), path.read_bytes()
        ways = {"delete": None, "replace": b"something else", "truncate": content[: len(content) // 2]}
        ways["flip"] = bytes([content[0] ^ 1]) + content[1:] if content else b"\x01"
        for way, changed in ways.items():
            if changed == content:
                continue
            words = "model.sig" if name == "model.sig" else Path(name).name

            def do(path: Path = path, changed: bytes | None = changed) -> None:
                path.unlink()  # served files are links to the stage's own
                if changed is not None:
                    path.write_bytes(changed)

            def undo(path: Path = path, content: bytes = content) -> None:
                path.unlink(missing_ok=True)
                path.write_bytes(content)

            yield Tampering(f"{way} {name}", do, undo, "missing" if changed is None else "altered", words)
    pipe, hidden, served = folder / "pipe", folder / ".git", folder / "artifacts" / "served"
    loop, round_ = folder / "artifacts" / "loop", served / "round"
    yield Tampering("add a link to a folder", lambda: loop.symlink_to(".."), loop.unlink, "altered", "model.sig")
    yield Tampering("add links in a circle", lambda: round_.symlink_to("round"), round_.unlink, "altered", "round")
    lineage, text = folder / "lineage.json", (folder / "lineage.json").read_bytes()
    back = lambda: lineage.write_bytes(text)  # noqa: E731
    yield Tampering("make the lineage huge", lambda: os.truncate(lineage, 2**36), back, "altered", "lineage.json was altered")
    yield Tampering("make the lineage no text", lambda: lineage.write_bytes(b"\xff"), back, "altered", "it is no text")
    yield Tampering("add a pipe", lambda: os.mkfifo(pipe), pipe.unlink, "altered", "pipe")
    yield Tampering("add what git keeps", lambda: hidden.write_text("code"), hidden.unlink, "foreign", ".git")
    foreign = folder / "sitecustomize.py"
    yield Tampering("add a file", lambda: foreign.write_text("code"), foreign.unlink, "foreign", "sitecustomize.py")


def artifacts(desk: Bench) -> Iterator[Tampering]:
    """What the version was made of and measured by: files, manifests, whole folders."""
    graph = LineageGraph.from_json(desk.registry.lineage_json(desk.registry.get(MODEL, "2")))
    for node in graph.nodes:
        folder = Path(str(local_path(node.uri)))
        away = folder.with_name(f"{folder.name}-away")
        yield Tampering(
            f"remove {node.id}", lambda f=folder, a=away: f.rename(a), lambda f=folder, a=away: a.rename(f), "missing", node.id
        )
        loop = folder / "loop"
        yield Tampering(f"a link in {node.id}", lambda p=loop: p.symlink_to(".."), loop.unlink, "altered", "loop is no plain file")
        manifest = folder / "manifest.json"
        if node.stage != "evaluate":
            continue
        for name, value in {"metrics": {"speedup_1": 999.0}, "parents": {"x": "y"}, "machine": {"cpu": "other"}, "seed": 7}.items():
            text = manifest.read_text()
            changed = json.dumps({**json.loads(text), name: value})
            do, undo = (lambda m=manifest, t=one: m.write_text(t) for one in (changed, text))
            yield Tampering(f"{name} in the manifest of {node.id}", do, undo, "altered", name)


def tags(desk: Bench) -> Iterator[Tampering]:
    client = desk.registry.client
    version = client.get_model_version(MODEL, "2")
    for name in ("metrics", "constraints", "objective", "evaluation", "checkpoint", "variant", "recipe", "run_id", "lineage_gzip"):
        value = {"metrics": '{"speedup_1": 999}', "constraints": '{"min_speedup": 0.1}'}.get(name, "other")
        do, undo = (
            lambda key=f"featherweight.{name}", v=one: client.set_model_version_tag(MODEL, "2", key, v)
            for one in (value, version.tags[f"featherweight.{name}"])
        )
        yield Tampering(f"tag {name}", do, undo, "altered", f"tag {name}")
    for name, words in {"digest": "registration", "lineage": "lineage.json", "attestation": "registration"}.items():
        do, undo = (
            lambda key=f"featherweight.{name}", v=one: client.set_model_version_tag(MODEL, "2", key, v)
            for one in ("0" * 64, version.tags[f"featherweight.{name}"])
        )
        yield Tampering(f"tag {name}", do, undo, "altered", words)
    for number, key in (("1", "featherweight.attestation"), ("2", "featherweight.attestation")):
        attested = client.get_model_version(MODEL, number).tags[key]
        gone = lambda n=number, k=key: client.delete_model_version_tag(MODEL, n, k)  # noqa: E731
        back = lambda n=number, k=key, v=attested: client.set_model_version_tag(MODEL, n, k, v)  # noqa: E731
        yield Tampering(f"delete the attestation of {number}", gone, back, "missing", "what attested the version was removed")
    for name in ("engine", "machine"):
        do, undo = (
            lambda key=f"featherweight.{name}", v=one: client.set_model_version_tag(MODEL, "2", key, v)
            for one in ("other", version.tags[f"featherweight.{name}"])
        )
        yield Tampering(f"tag {name}", do, undo, "altered", f"tag {name}")
    named = lambda: client.set_registered_model_tag(MODEL, "featherweight.name", MODEL)  # noqa: E731
    other = lambda: client.set_registered_model_tag(MODEL, "featherweight.name", "other")  # noqa: E731
    yield Tampering("tag name", other, named, "out of step", "it says other")
    gone = lambda: client.delete_registered_model_tag(MODEL, "featherweight.name")  # noqa: E731
    yield Tampering("delete the tag name", gone, named, "missing", "tag name")

    def sourced(place: str | None) -> None:
        with sqlite3.connect(desk.root / "mlflow.db") as base:
            base.execute("update model_versions set source = ? where name = ? and version = 2", [place, MODEL])

    do, undo = (lambda v=one: sourced(v) for one in ("models:/m-" + "0" * 32, version.source))
    yield Tampering("MLflow's source", do, undo, "altered", "MLflow's page names models:/m-0000")
    stage = (lambda v=one: client.set_model_version_tag(MODEL, "1", "featherweight.stage", v) for one in ("production", "archived"))
    yield Tampering("tag stage", *stage, "out of step", "stage tag of version 1")
    moved = (lambda v=one: client.transition_model_version_stage(MODEL, "1", v) for one in ("Production", "Archived"))
    yield Tampering("MLflow's stage", *moved, "out of step", "MLflow's stage of version 1")


def aliases(desk: Bench) -> Iterator[Tampering]:
    client = desk.registry.client
    for alias, version in {"champion": "2", "production": "2", "previous": "1"}.items():
        other = "1" if version == "2" else "2"
        do, undo = (lambda a=alias, v=one: client.set_registered_model_alias(MODEL, a, v) for one in (other, version))
        yield Tampering(f"move {alias}", do, undo, "out of step", f"alias {alias}")
        gone = lambda a=alias: client.delete_registered_model_alias(MODEL, a)  # noqa: E731
        yield Tampering(f"delete {alias}", gone, undo, "out of step", f"alias {alias}")
    for alias in ("challenger", "staging"):
        gone = lambda a=alias: client.delete_registered_model_alias(MODEL, a)  # noqa: E731
        do = lambda a=alias: client.set_registered_model_alias(MODEL, a, "1")  # noqa: E731
        yield Tampering(f"set {alias}", do, gone, "out of step", f"alias {alias}")


def history(desk: Bench) -> Iterator[Tampering]:
    client = desk.registry.client

    def rows(statement: str, *values: str) -> Callable[[], None]:
        def write() -> None:
            with sqlite3.connect(desk.root / "mlflow.db") as base:
                base.execute(statement, values)

        return write

    def undelete(number: str) -> None:
        with sqlite3.connect(desk.root / "mlflow.db") as base:
            base.execute("update model_versions set current_stage = 'None' where name = ? and version = ?", [SIDE, int(number)])

    for number in "12":
        stored = client.get_model_version(SIDE, number).tags
        for way, text in {"edit": stored[ENTRY].replace("good", "bad"), "garble": "{}"}.items():
            do, undo = (lambda n=number, t=one: client.set_model_version_tag(SIDE, n, ENTRY, t) for one in (text, stored[ENTRY]))
            yield Tampering(f"{way} entry {number}", do, undo, "altered", f"entry {number}")
        do, undo = (lambda n=number, t=one: client.set_model_version_tag(SIDE, n, SIGNED, t) for one in ("MAo=", stored[SIGNED]))
        yield Tampering(f"sign entry {number} anew", do, undo, "altered", f"entry {number}")
        gone = lambda n=number: client.delete_model_version(SIDE, n)  # noqa: E731
        yield Tampering(f"delete entry {number}", gone, lambda n=number: undelete(n), "altered", f"entry {number}")

    def put(key: str, text: str) -> Callable[[], object]:
        return lambda: client.set_model_version_tag(SIDE, "2", key, text)

    for way, key, text in (("nest", ENTRY, "[" * 90_000), ("sign in no base64", SIGNED, "é")):
        yield Tampering(f"{way} entry 2", put(key, text), put(key, stored[key]), "altered", "entry 2")

    def again() -> None:
        client.create_model_version(SIDE, "featherweight:/history", tags=dict(client.get_model_version(SIDE, "1").tags))

    def others() -> None:
        entry = client.get_model_version(SIDE, "2").tags
        born = json.dumps({**json.loads(entry[ENTRY]), "model": 7})
        client.create_model_version(SIDE, "featherweight:/history", tags={ENTRY: born, SIGNED: Keys.here().sign(born)})

    yield Tampering("an entry of another model", others, lambda: client.delete_model_version(SIDE, "3"), "foreign", "another model")
    yield Tampering("entry 1 once more", again, lambda: client.delete_model_version(SIDE, "4"), "foreign", "entry 1 once more")
    stripped = client.get_model_version(SIDE, "2").tags[SIGNED]
    yield Tampering(
        "strip the signature of entry 2",
        lambda: client.delete_model_version_tag(SIDE, "2", SIGNED),
        lambda: client.set_model_version_tag(SIDE, "2", SIGNED, stripped),
        "foreign",
        "entry 2",
    )
    gone = lambda: client.delete_registered_model_tag(SIDE, "featherweight.name")  # noqa: E731
    served = lambda: client.set_registered_model_tag(SIDE, "featherweight.name", SIDE)  # noqa: E731
    yield Tampering("serve the history", served, gone, "altered", "tagged as a served model")
    renamed = (rows("update registered_models set name = ? where name = ?", *one) for one in (("x", SIDE), (SIDE, "x")))
    yield Tampering("tear the history from its model", *renamed, "missing", "nothing can be decided")
    mark = client.get_registered_model(MODEL).tags["featherweight.history_head"]

    def cut() -> None:
        client.delete_model_version(SIDE, "2")
        client.delete_registered_model_tag(MODEL, "featherweight.history_head")

    def mend() -> None:
        undelete("2")
        client.set_registered_model_tag(MODEL, "featherweight.history_head", mark)

    yield Tampering("delete the newest entry and its mark", cut, mend, "missing", "seen from here")


def figures(desk: Bench) -> Iterator[Tampering]:
    client, id = desk.registry.client, desk.registry.get(MODEL, "2").tag("model_id")
    do, undo = (lambda v=one: client.log_metric(desk.run_id, "speedup_1", v) for one in (999.0, METRICS["speedup_1"]))
    yield Tampering("a run's metric", do, undo, "altered", "figures in the run")
    yield Tampering(
        "delete the run", lambda: client.delete_run(desk.run_id), lambda: client.restore_run(desk.run_id), "missing", "run of"
    )

    def rewrite(value: float) -> None:
        with sqlite3.connect(desk.root / "mlflow.db") as base:
            base.execute(
                "update logged_model_metrics set metric_value = ? where model_id = ? and metric_name = 'speedup_1'", [value, id]
            )

    def fields(table: str, field: str, value: str, key: str) -> Callable[[], None]:
        def write() -> None:
            with sqlite3.connect(desk.root / "mlflow.db") as base:
                base.execute(f"update {table} set {field} = ? where {key}", [value])

        return write

    with sqlite3.connect(desk.root / "mlflow.db") as base:
        ((digest, source),) = base.execute("select digest, dataset_source from datasets").fetchall()
        ((place,),) = base.execute("select artifact_location from logged_models where model_id = ?", [id]).fetchall()
    for field, was in (("digest", digest), ("dataset_source", source)):
        do, undo = (fields("datasets", field, one, "true") for one in ("{}", was))
        yield Tampering(f"the {field} of a data set", do, undo, "altered", "data set text/evaluation")
    do, undo = (fields("logged_models", "artifact_location", one, f"model_id = '{id}'") for one in ("elsewhere", place))
    yield Tampering("a logged model's place", do, undo, "altered", "logged model place")
    do, undo = (lambda v=one: client.set_logged_model_tags(id, {"featherweight.variant": v}) for one in ("other", "two"))
    yield Tampering("a logged model's tag", do, undo, "altered", "logged model featherweight.variant")
    yield Tampering(
        "a logged model's metric", lambda: rewrite(999.0), lambda: rewrite(8.0), "altered", "figures in the logged model"
    )


def trust(desk: Bench) -> Iterator[Tampering]:
    keys = Keys.here().folder

    def replaced() -> None:
        shutil.move(keys / "public.pem", keys / "kept")
        (keys / "public.pem").write_bytes(Keys(desk.root / "other").make().read_bytes())

    yield Tampering(
        "replace the key", replaced, lambda: shutil.move(keys / "kept", keys / "public.pem"), "altered", "no trusted key"
    )


@pytest.mark.slow
def test_each_tampering_is_named(whole: Bench) -> None:
    assert wrong(whole) == []
    count = 0
    for tell in (files, artifacts, tags, aliases, history, figures, trust):
        for tampering in tell(whole):
            tampering.do()
            found = [f"{one.part} {one.reason}" for one in wrong(whole) if one.state == tampering.state]
            assert any(tampering.words in one for one in found), (tampering.name, tampering.state, found, wrong(whole))
            tampering.undo()
            count += 1
    assert wrong(whole) == []
    assert count >= 60
    print(f"{count} tamperings")


def test_a_copied_and_a_hand_made_version_are_foreign(whole: Bench) -> None:
    client = whole.registry.client
    first = client.get_model_version(MODEL, "1")
    source = first.tags["featherweight.location"]
    client.create_model_version(MODEL, source, first.run_id, tags=dict(first.tags), await_creation_for=0)
    client.create_model_version(MODEL, source, first.run_id, {**first.tags, "featherweight.digest": "d"}, await_creation_for=0)
    del first
    found = {one.version: one.reason for one in wrong(whole) if one.state == "foreign" and one.part == "registration"}
    assert found["3"] == "the artifact of version 1 once more"
    assert any(one.version == "4" and one.part == "registration" for one in wrong(whole))


def test_who_trusts_no_key_is_told_that_signatures_were_not_looked_at(whole: Bench, tmp_path: Path, monkeypatch) -> None:
    assert "signatures" not in audit_registry(Workspace.at(whole.root), MODEL, False).to_text()
    monkeypatch.setenv("FEATHERWEIGHT_KEYS", str(tmp_path / "none"))
    told = audit_registry(Workspace.at(whole.root), MODEL, False).to_text()
    assert "signatures of 2 versions not looked at: no key is trusted here" in told


def test_a_row_that_mlflow_would_not_write_is_told_in_a_line(whole: Bench) -> None:
    place = "rowid = (select max(rowid) from model_versions where name = ?)"
    for field, value in (("version", "abc"), ("version", 9e300), ("creation_time", "abc"), ("creation_time", -1.5)):
        with sqlite3.connect(whole.root / "mlflow.db") as base:
            ((was,),) = base.execute(f"select {field} from model_versions where {place}", [MODEL]).fetchall()
            base.execute(f"update model_versions set {field} = ? where {place}", [value, MODEL])
        for ask in (lambda: audit_model(whole.registry, MODEL), whole.registry.all_models):
            with pytest.raises(IntegrityError, match="a version of 'little-llama' was altered in MLflow's database: version "):
                ask()
        with sqlite3.connect(whole.root / "mlflow.db") as base:
            base.execute(f"update model_versions set {field} = ? where {place}", [was, MODEL])
    assert wrong(whole) == []
    with sqlite3.connect(whole.root / "mlflow.db") as base:
        base.execute("update model_version_tags set value = null where name = ? and version = 2", [MODEL])
    assert {"registration", "lineage.json"} <= {one.part for one in wrong(whole) if one.version == "2"}
    with sqlite3.connect(whole.root / "mlflow.db") as base:
        base.execute("update model_version_tags set value = null where name = ?", [SIDE])
        base.execute("update registered_model_tags set value = null where name = ?", [MODEL])
    assert "history entry 1 is not readable; it was altered outside Featherweight" in {one.reason for one in wrong(whole)}


def test_no_tag_hides_a_model_from_an_audit_of_all(whole: Bench) -> None:
    whole.registry.client.set_registered_model_tag(MODEL, "featherweight.history_of", "another")
    assert whole.registry.models() == [MODEL]
    assert {one.model for one in audit_registry(Workspace.at(whole.root), "", False).findings} == {MODEL}


def test_nothing_is_decided_on_a_history_that_was_seen_whole_and_is_not(whole: Bench) -> None:
    client = whole.registry.client
    client.delete_model_version(SIDE, "2")
    client.delete_registered_model_tag(MODEL, "featherweight.history_head")
    with pytest.raises(IntegrityError, match="history entry 2, which was seen from here, is not there any more"):
        whole.registry.rollback(MODEL, "eve", "x")
    with pytest.raises(IntegrityError, match="seen from here"):
        whole.registry.settle(MODEL)
    assert client.get_registered_model(MODEL).aliases["champion"] == 2
    repaired = audit_registry(Workspace.at(whole.root), MODEL, True)
    assert "entry 2 was removed or altered: what is left counts" in repaired.to_text()
    assert client.get_registered_model(MODEL).aliases["champion"] == 1
    assert whole.registry.transition(MODEL, "2", "production", who="ada", why="again").stage == "production"


def test_the_page_shows_the_verdict_and_the_whole_lineage(whole: Bench, tmp_path: Path) -> None:
    """Offline, and what users named is escaped."""
    client, workspace, page = whole.registry.client, Workspace.at(whole.root), tmp_path / "pages" / "lineage.html"
    audit_registry(workspace, "", False, page)
    text = page.read_text()
    assert 'class="good">all ok</span>' in text
    assert not re.search(r"url\(|@import|https?://|<script", text)
    client.set_model_version_tag(MODEL, "2", "featherweight.variant", "<script>evil</script>")
    graph = LineageGraph.from_json(whole.registry.lineage_json(whole.registry.get(MODEL, "2")))
    shutil.rmtree(str(local_path(graph.nodes[0].uri)))
    assert audit_registry(workspace, MODEL, False, page).wrong
    text = page.read_text()
    assert "<td>altered" in text.replace('<td class="bad">', "<td>")
    assert f'{graph.nodes[0].id}</th><td class="bad">missing</td>' in text
    for words in (graph.nodes[-1].digest, "little-llama/1", "by ada: two is good", "speedup_1_high"):
        assert words in text
    assert "<script" not in text
    one = audit(workspace, f"{MODEL}/2", False, page)
    assert (one.verdicts, "not verified" in page.read_text(), "not looked at" in page.read_text()) == ((), True, True)


def test_the_audit_repairs_what_follows_and_takes_out_what_cannot_be_read(whole: Bench) -> None:
    workspace, client = Workspace.at(whole.root), whole.registry.client
    assert audit_registry(workspace, "", False).to_text().endswith(" ok, 0 not")
    client.set_registered_model_alias(MODEL, "champion", "1")
    client.set_model_version_tag(SIDE, "1", ENTRY, "no JSON")
    held = whole.state()
    before = audit_registry(workspace, MODEL, False)
    assert {one.state for one in before.wrong} >= {"altered", "out of step"}
    assert "alias champion  somebody set it to 1 in MLflow, the history has it at 2" in before.to_text()
    assert whole.state() == held
    repaired = audit_registry(workspace, MODEL, True)
    assert [one.state for one in repaired.wrong if one.state == "out of step"] == []
    assert any("entry 1 is out, it was not readable" in line for line in repaired.repaired)
    assert "alias champion went from 2 to 1; undone" in repaired.to_text()
    assert client.get_registered_model(MODEL).aliases["champion"] == 2
    assert json.loads(json.dumps(repaired.to_dict()))["ok"] is False  # what was taken out stays told


def test_what_others_named_reaches_no_terminal_as_they_wrote_it(whole: Bench, tmp_path: Path) -> None:
    """Names of files, tags, reasons: each line of a look is one of ours, and pages are written."""
    hostile = "\n0 ok, 0 not\x1b[2J\u202e"
    folder = Path(str(local_path(whole.registry.get(MODEL, "2").source)))
    (folder / os.fsdecode(b"x\n0 ok, 0 not\x1b[2J\xff")).write_bytes(b"foreign")
    whole.registry.client.set_model_version_tag(MODEL, "2", "featherweight.variant", hostile)
    whole.registry.transition(MODEL, "1", "production", who=f"ada{hostile}", why=hostile)
    workspace, page = Workspace.at(tmp_path), tmp_path / "page.html"
    looks = [
        audit_registry(workspace, MODEL, False, page),
        audit(workspace, f"{MODEL}/2", True, page),
        history_of(workspace, MODEL),
        compared(workspace, f"{MODEL}/1", "2"),
    ]
    for look in looks:
        assert all(line.isprintable() for line in look.to_text().splitlines())
        assert "0 ok, 0 not" not in look.to_text().splitlines()
        json.dumps(look.to_dict()).encode()
    assert r"x\n0 ok, 0 not\x1b[2J\udcff" in looks[0].to_text() and r"ada\n0 ok, 0 not\x1b[2J\u202e" in looks[2].to_text()
    with pytest.raises(IntegrityError) as told:
        looks[0].raise_if_wrong()
    assert one_line(told.value).isprintable()
