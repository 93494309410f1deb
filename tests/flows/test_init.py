"""`init`: six answers, or flags, become a recipe that plans; nothing is replaced, and nothing asked where nobody can answer."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from featherweight.errors import DataError, RecipeError
from featherweight.recipe.advice.asking import machine_asked
from featherweight.recipe.plan import expand
from featherweight.recipe.reading import load_recipe
from flows import init
from flows.cli import app
from flows.composed import Wanted, budget_of, machine_named, text_named, use_of
from tests.support.headers import headers_alone


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return headers_alone(tmp_path_factory.mktemp("tiny"))


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["init", *arguments])
    assert isinstance(result.exception, RecipeError), result.output
    return str(result.exception)


@pytest.mark.slow
def test_flags_ask_nothing_and_what_is_written_plans(checkpoint: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "new" / "recipe.yaml"
    text.write_text("a text\n")
    flags = ("--text", str(text), "--machine", "cpu", "--for", "batch:4", "--max-loss", "2%", "--budget", "1h", "--out", str(out))
    place = ("--workspace", str(tmp_path / "none"))
    result = CliRunner().invoke(app, ["init", str(checkpoint), *flags, *place])
    assert result.exit_code == 0, result.output
    recipe = load_recipe(out)
    assert expand(recipe).variants and f"{len(recipe.variants or ())} variants" in result.output
    assert (recipe.data.source, recipe.objective, recipe.constraints.max_quality_loss) == (str(text), "speedup@4", 0.02)
    assert 4 in recipe.workload.batch_sizes
    first, *others = out.read_text().splitlines()
    assert first.startswith(f"# featherweight init {checkpoint} --text {text} --for batch:4") and "expected" in "".join(others)
    assert [path.name for path in out.parent.iterdir()] == ["recipe.yaml"] and not (tmp_path / "none").exists()

    out.write_text("mine")
    assert "--force replaces it" in refused(str(checkpoint), *flags) and out.read_text() == "mine"
    assert CliRunner().invoke(app, ["init", str(checkpoint), *flags, *place, "--force"]).exit_code == 0
    assert out.read_text().startswith(first)


@pytest.mark.slow
def test_the_questions_are_asked_until_each_has_an_answer(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = iter(["", "./nowhere", str(checkpoint), "", "soon", "users:16", "T5", "2xL4", "", "1h"])
    asked: list[str] = []

    def ask(words: str) -> str:
        asked.append(words)
        return next(given)

    name, wanted = init.answers(ask, Wanted(max_loss="3%"))
    assert (name, wanted) == (str(checkpoint), Wanted("none", "1h", "3%", "users:16", "2xL4"))
    assert {words[0] for words in asked} == set("123456") and asked[-2].endswith("[3%]: ")
    told = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0].split()[0] for line in told] == ["./nowhere", "--for", "T5"]


def test_who_cannot_answer_is_told_how_to_say_it_at_once() -> None:
    assert "there is no terminal to ask at" in refused()

    def ended(words: str) -> str:
        raise EOFError

    with pytest.raises(RecipeError, match="ended before the last question"):
        init.answers(ended, Wanted())


def test_a_file_that_comes_meanwhile_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "recipe.yaml"

    class Made:
        text = ""

        def write(self, path: Path) -> Path:
            path.write_text("theirs")
            out.write_text("mine")
            return path

    monkeypatch.setattr(init, "load_recipe", lambda path: None)
    with pytest.raises(RecipeError, match="is there already"):
        init._place(Made(), out, force=False)  # type: ignore[arg-type]
    assert out.read_text() == "mine" and list(tmp_path.iterdir()) == [out]


def test_what_a_user_answers(tmp_path: Path) -> None:
    assert [(use_of(text).sequences, use_of(text).concurrent) for text in ("one", "users:16", "batch:8")] == [
        (1, False),
        (16, True),
        (8, False),
    ]
    assert (machine_named("this").device, machine_named("cpu").device, machine_named("2xL4").cards) == ("auto", "cpu", "2xL4")
    there, here = machine_asked(None, None, None, None, "2 x rtx 4090")
    assert [(gpu.name, gpu.memory_bytes // 2**30) for gpu in there.gpus] == [("RTX 4090", 24)] * 2 and not here
    assert [text_named(text) for text in (None, "none", "python-stdlib", "s3://b/p", str(tmp_path))] == [
        *(None, None, None, "s3://b/p"),
        str(tmp_path),
    ]
    for wrong in (use_of, machine_named):
        with pytest.raises(RecipeError, match="users:0"):
            wrong("users:0")
    for none in ("0", "0m", "-5m", f"{10**9 + 1}s"):
        with pytest.raises(RecipeError, match="--budget"):
            budget_of(none)
    with pytest.raises(DataError, match="no such file or folder"):
        text_named(str(tmp_path / "absent"))
