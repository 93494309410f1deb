"""CTranslate2 writes in a shortlist as transformers does whose other tokens are forbidden; scores know nothing of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from featherweight.errors import RecipeError
from featherweight.recipe.recipe import Recipe
from featherweight.runtimes.ctranslate2 import shortlist
from featherweight.runtimes.ctranslate2.shortlist import likely_targets, write_shortlist
from featherweight.store.served_folder import Serving
from featherweight.text.documents import Document, write_documents
from tests.support.families import family_checkpoint, sentence
from tests.support.serving_models import exported, opened, score, serving_spec, windows_of

MOST, NEW = 3, 10


def test_what_goes_with_a_source_token_more_than_with_others_is_likely() -> None:
    pairs = [([5, 7], [50, 70, 1]), ([5, 8], [50, 80, 1]), ([9], [90, 1]), ([7, 9], [70, 90, 1])]
    common, chosen = likely_targets(pairs, 2)
    assert common == [1, 50] and chosen[5] == [50, 1] and chosen[9] == [90, 1] and chosen[8][0] == 80


def test_a_token_with_a_space_is_in_no_line_and_a_shared_one_may_be_copied(tmp_path: Path) -> None:
    write_shortlist(tmp_path, [([1], [1, 2])], ["<s>", "a", "b c"], ["<s>", "a", "b c"], 2, [0])
    assert (tmp_path / shortlist.FILE).read_text() == "\t<s> a\n<s>\t<s>\na\ta\n"


def allowed(folder: Path, source: list[int]) -> set[int]:
    """What may be written behind a source, by the file that was written, and what CTranslate2 always allows."""
    weights = folder / "ctranslate2"
    vocabulary = json.loads((weights / "shared_vocabulary.json").read_text())
    ids = {token: place for place, token in enumerate(vocabulary)}
    lists = dict(line.rstrip("\n").split("\t") for line in (weights / shortlist.FILE).read_text().splitlines())
    config = json.loads((weights / "config.json").read_text())
    special = {ids[config[name]] for name in ("bos_token", "eos_token", "unk_token") if config[name]}
    keys = ["", *(vocabulary[token] for token in source)]
    return special | {ids[token] for key in keys for token in lists.get(key, "").split(" ") if token}


def within(model: Any, source: list[int], tokens: set[int]) -> list[int]:
    """What transformers writes greedily, and without an end, in these tokens alone."""
    import torch

    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    told: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "num_beams": 1}
    found = model.generate(torch.tensor([source]), **told, prefix_allowed_tokens_fn=lambda *_: sorted(tokens))
    return list(found[0, 1:].tolist())


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["marian", "t5"])
def test_texts_are_those_of_the_shortlist_and_scores_those_of_the_whole_vocabulary(kind: str, tmp_path: Path) -> None:
    source = family_checkpoint(kind, tmp_path / "checkpoint")
    lines = [sentence(start, 9 + start % 5) for start in range(8)]
    text = tmp_path / "text"
    write_documents(text, [Document(str(i), line, " ".join(reversed(line.split()))) for i, line in enumerate(lines)])
    whole, metrics = exported(source, text, tmp_path / "whole", engine="ctranslate2")
    short, again = exported(source, text, tmp_path / "short", engine="ctranslate2", shortlist=MOST)
    assert metrics["parity_max_abs"] == pytest.approx(again["parity_max_abs"], abs=1e-5) and not (short / "twin").exists()
    assert Serving.read(short).options["shortlist"] == str(MOST) and "shortlist" not in Serving.read(whole).options
    model, windows = windows_of(source, text)
    engine = opened(short)
    sources = [window.source for window in windows]
    written = [engine.generate([ids], NEW).tokens[0] for ids in sources]
    assert written == [within(model, ids, allowed(short, ids)) for ids in sources]
    assert written != opened(whole).generate(sources, NEW).tokens
    together = set[int]().union(*(allowed(short, ids) for ids in sources[:3]))
    assert engine.generate(sources[:3], NEW).tokens == [within(model, ids, together) for ids in sources[:3]]
    assert score(engine, windows) == score(opened(whole), windows)


def recipe(**keys: Any) -> Recipe:
    export = {"short": {"engine": "ctranslate2", "shortlist": 50}}
    tree = {"name": "x", "checkpoint": {"source": "x"}, "data": {"source": "x"}, "promote": {"model": "x"}}
    return Recipe.model_validate({**tree, "task": "text2text-generation", "stages": {"export": export}, **keys})


def test_a_shortlist_is_measured_by_answers_and_wants_a_source() -> None:
    with pytest.raises(ValueError, match=r"short writes other texts than its scores tell of; say workload\.changed_answers"):
        recipe()
    assert recipe(workload={"changed_answers": {"prompts": 10}}).stages.export["short"].changes_texts_alone


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_model_without_a_source_has_no_shortlist(kind: str, tmp_path: Path) -> None:
    source = family_checkpoint(kind, tmp_path / "checkpoint")
    write_documents(tmp_path / "text", [Document("0", sentence(0, 30))])
    with pytest.raises(RecipeError, match="shortlist: it goes by the source of a text"):
        exported(source, tmp_path / "text", tmp_path / "out", engine="ctranslate2", shortlist=5)
    assert serving_spec(engine="ctranslate2", shortlist=5).changes_texts_alone
