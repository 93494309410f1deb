"""Served folders: what they hold, and when two are the same."""

from __future__ import annotations

from featherweight.store.served_folder import same_files, served_bytes


def test_folders_are_the_same_by_their_bytes(tmp_path):
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    for folder, content in ((one, "abc"), (two, "abc"), (three, "abd")):
        (folder / "sub").mkdir(parents=True)
        (folder / "sub" / "weights").write_text(content)
    assert same_files(one, one) and same_files(one, two) and not same_files(one, three)
    (two / "more").write_text("")
    assert not same_files(one, two)
    assert served_bytes(two) == 3
