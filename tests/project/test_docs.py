"""The documentation's pages: whole, led to, and told by the code. Its commands are held by test_house_rules, with the README's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from featherweight.errors import FeatherweightError
from infra.site import build, reference
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build(folder)
    return folder


def test_every_page_of_the_documentation_is_there_and_every_link_leads_somewhere(site: Path) -> None:
    pages = {page.stem: page.read_text() for page in site.glob("*.html")}
    assert {"index", "reference", "security"} | {one.stem for one in (ROOT / "docs").rglob("guide/*.md")} <= pages.keys()
    assert {one.stem for one in (ROOT / "docs").glob("*.md")} <= pages.keys()
    for name, page in pages.items():
        links = [link.partition("#")[0] for link in re.findall(r'href="([^"]*)"', page)]
        gone = [
            link for link in links if link and "://" not in link and not link.startswith("data:") and not (site / link).exists()
        ]
        assert not gone, f"{name} leads to {gone}"
        assert not re.search(r"(src|<link[^>]*href)=\"https?:", page), "it opens offline"


def test_every_file_that_is_named_is_there() -> None:
    named = r"`((?:docs|recipes|infra|benchmarks|tests|conformance|featherweight|tasks|flows)/[\w./-]+)`"
    pages = (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").glob("*.md"))
    gone = [(page.name, path) for page in pages for path in re.findall(named, page.read_text()) if not (ROOT / path).exists()]
    assert pages and gone == []


def test_the_reference_is_the_code() -> None:
    told = reference()
    for word in (
        "## featherweight optimize",
        "`--max-loss`",
        "`promote.approval` | 'none'",
        "`stages.distill.steps` | 100",
        "`gptq`",
    ):
        assert word in told
    for kind in FeatherweightError.__subclasses__():
        assert f"| {kind.exit_code} |" in told
