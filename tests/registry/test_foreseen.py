"""What the registry would refuse whatever wins is told before the work: by the plan, and as an optimization begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from featherweight.errors import Forbidden, GateError, IntegrityError, ServiceError
from featherweight.recipe.reading import load_recipe
from featherweight.recipe.recipe import Recipe
from featherweight.registry.keys import Keys
from featherweight.registry.promotion import gated_transition
from tasks.forecast import forecast, standing
from tests.support.command import command_here
from tests.support.paths import TINY_RECIPE
from tests.support.registering import METRICS, MODEL, Bench, desk

__all__ = ["desk"]


def recipe(**changes: Any) -> Recipe:
    """The tiny recipe, for the bench's model."""
    said = {"promote.model": MODEL, **changes}
    return load_recipe(TINY_RECIPE, [f"{name}={value}" for name, value in said.items()])


@pytest.fixture
def seated(desk: Bench) -> Bench:
    """A bench whose version 1 is champion; it was measured at batch 1 alone."""
    desk.registry.register(desk.winner("v1"))
    gated_transition(desk.registry, MODEL, "1", who="ada", why="first")
    return desk


def test_a_champion_that_was_measured_as_the_candidates_will_be_is_no_news(seated: Bench) -> None:
    assert standing(recipe(), seated.registry.tracking_uri) == ()
    assert standing(recipe(objective="size"), seated.registry.tracking_uri) == ()
    assert standing(recipe(**{"promote.model": "another"}), seated.registry.tracking_uri) == ()


def test_what_the_champion_was_not_measured_at_is_told(seated: Bench) -> None:
    (note,) = standing(recipe(objective="speedup@2"), seated.registry.tracking_uri)
    assert note == (
        "no other winner will be promoted: speedup_2 was not measured with its confidence interval of the champion, "
        "version 1 (v1); take an objective that it was measured at, or force"
    )
    other = desk_winner(seated, {**METRICS, **{f"speedup_2{end}": 9.0 for end in ("", "_low", "_high")}})
    with pytest.raises(GateError, match="speedup_2 was not measured with its confidence interval of the champion"):
        gated_transition(seated.registry, MODEL, other, who="ada", why="next", objective="speedup@2")
    for stage in ("staging", "none"):
        assert standing(recipe(objective="speedup@2", **{"promote.stage": stage}), seated.registry.tracking_uri) == ()


def desk_winner(bench: Bench, metrics: dict[str, float]) -> str:
    return bench.registry.register(bench.winner("v2", metrics=metrics)).version


def test_a_champion_whose_evidence_is_gone_is_told(seated: Bench) -> None:
    (file,) = seated.root.glob("artifacts-of-runs/v1-measured/measurement.json")
    file.write_text(file.read_text().replace("8.0", "999.0"))
    (note,) = standing(recipe(), seated.registry.tracking_uri)
    assert "no verified evaluation of version 1" in note
    assert note.endswith("file measurement.json is altered; re-evaluate the champion, or force")


def test_a_renamed_model_stops_the_work_before_it_begins(seated: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seated.registry.client.rename_registered_model(MODEL, "llama-of-may")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", seated.registry.tracking_uri)
    with pytest.raises(GateError, match="'little-llama' was renamed to 'llama-of-may' in MLflow; rename it back, or write"):
        forecast(recipe(), seated.root)
    asked = ("plan", str(TINY_RECIPE), "--set", f"promote.model={MODEL}")
    told = command_here(*asked, cwd=seated.root, MLFLOW_TRACKING_URI=seated.registry.tracking_uri)
    assert told.returncode != 0
    assert "was renamed to 'llama-of-may'" in told.stderr


def test_a_history_that_was_cut_off_stops_it_where_something_is_to_be_promoted(seated: Bench) -> None:
    seated.registry.client.delete_model_version(f"{MODEL}.history", "1")
    with pytest.raises(IntegrityError, match="entry 1, which the aliases followed, was removed or altered; nothing is decided"):
        standing(recipe(), seated.registry.tracking_uri)
    assert standing(recipe(**{"promote.stage": "none"}), seated.registry.tracking_uri) == ()


def test_who_has_no_key_where_entries_are_signed_is_told(desk: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATHERWEIGHT_KEYS", str(tmp_path / "keys"))
    Keys.here().make()
    desk.registry.register(desk.winner("v1"))
    gated_transition(desk.registry, MODEL, "1", who="ada", why="first")
    assert standing(recipe(), desk.registry.tracking_uri) == ()
    monkeypatch.setenv("FEATHERWEIGHT_KEYS", str(tmp_path / "none"))
    with pytest.raises(Forbidden, match="entries of 'little-llama' are signed; one of this user, who has no key"):
        standing(recipe(), desk.registry.tracking_uri)


def test_a_plan_in_a_folder_that_can_be_no_workspace_says_so(tmp_path: Path) -> None:
    with pytest.raises(ServiceError, match="question mark; take another folder"):
        forecast(recipe(), tmp_path / "a?b")


def test_a_plan_is_made_where_no_server_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    notes = forecast(recipe(), tmp_path).warnings
    assert [note for note in notes if note.startswith("what the registry would refuse is not known: ")]
