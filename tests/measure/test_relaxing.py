"""What to relax where nothing keeps the constraints."""

from __future__ import annotations

from featherweight.measure.relaxing import nearest
from featherweight.measure.spec import ConstraintsSpec


def row(loss: float, speed: float, size: float = 1e6) -> dict[str, float]:
    told = {"quality_change": loss, "quality_change_low": loss - 0.001, "quality_change_high": loss + 0.001, "size_bytes": size}
    return told | {"speedup_1": speed, "speedup_1_low": speed * 0.98, "speedup_1_high": speed * 1.02}


def test_it_is_the_one_that_breaks_the_least_and_the_bound_that_it_would_keep() -> None:
    found = nearest(
        ConstraintsSpec(max_quality_loss=0.01), "speedup@1", {"a": row(0.03, 9), "b": row(0.02, 3), "baseline": row(0, 1)}
    )
    assert found and found.name == "b" and found.words == "relax max_quality_loss to 2.12 %"
    assert nearest(ConstraintsSpec(max_quality_loss=found.bounds["max_quality_loss"]), "speedup@1", {"b": row(0.02, 3)}) is None


def test_fewer_broken_constraints_come_first_and_a_speed_is_relaxed_downwards() -> None:
    asked = ConstraintsSpec(max_quality_loss=0.01, min_speedup=4)
    found = nearest(asked, "speedup@1", {"both": row(0.011, 3.9), "one": row(0.005, 2)})
    assert found and found.name == "one" and 1.9 < found.bounds["min_speedup"] < 1.96
    assert found.words.startswith("relax min_speedup to 1.9")


def test_however_far_a_bound_is_away_what_is_asked_for_instead_is_near_what_was_found() -> None:
    found = nearest(ConstraintsSpec(min_speedup=1000), "speedup@1", {"a": row(0, 15)})
    assert found and 14 < found.bounds["min_speedup"] < 15


def test_where_one_keeps_all_there_is_nothing_to_relax() -> None:
    assert nearest(ConstraintsSpec(max_quality_loss=0.01), "speedup@1", {"a": row(0.001, 9), "b": row(0.5, 3)}) is None
    assert nearest(ConstraintsSpec(max_quality_loss=0.01), "speedup@1", {"baseline": row(0.5, 3)}) is None
