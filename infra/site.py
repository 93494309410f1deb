"""The documentation as pages that open offline: the guide and docs/*.md as they are, the reference out of the code.

python -m infra.site build/docs
"""

from __future__ import annotations

import html
import re
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from featherweight.report.rendering import template_text

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ("docs/guide/tutorial.md", "docs/guide/how-to.md", "docs/guide/why.md")
MORE = "section > * + h2 { margin-top: 1.6em; }\n"
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · Featherweight</title><link rel="icon" href="data:,"><link rel="stylesheet" href="style.css"></head>
<body><a class="skip" href="#content">Skip to the content</a>
<header><p class="brand">Featherweight</p><nav aria-label="Pages"><ul>{links}</ul></nav></header>
<main id="content" tabindex="-1">{body}</main></body></html>
"""


def pages() -> dict[str, str]:
    """Markdown by name of the page, in the order of the navigation."""
    written = [ROOT / one for one in GUIDE] + sorted((ROOT / "docs").glob("*.md"))
    return {one.stem: one.read_text() for one in written} | {
        "reference": reference(),
        "security": (ROOT / "SECURITY.md").read_text(),
    }


def reference() -> str:
    """Commands, keys of a recipe, methods, engines and exit codes, as the code has them."""
    parts = ["# Reference", *commands(), *exit_codes(), "## Keys of a recipe", "", "| key | default |", "|---|---|", *recipe_keys()]
    return "\n".join([*parts, "", *names()])


def commands() -> Iterator[str]:
    """Each command with its options."""
    from typer.main import get_command

    from flows.cli import app

    for name, command in sorted(get_command(app).commands.items()):  # type: ignore[attr-defined]
        yield f"## featherweight {name}\n\n{_text(command.help or '')}\n\n| option | meaning |\n|---|---|"
        for one in command.params:
            help = getattr(one, "help", "") or ""
            told = "/".join([*one.opts, *one.secondary_opts]) if one.param_type_name == "option" else one.name.upper()
            known = not (one.default in (None, "", [], ()) or isinstance(one.default, bool) or callable(one.default))
            yield f"| `{told}` | {_text(f'{help} Default: {one.default}.' if known else help)} |"
        yield ""


def exit_codes() -> Iterator[str]:
    """What each number means, by the class of the error."""
    from featherweight import errors

    found = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, errors.FeatherweightError)]
    yield "## Exit codes\n\n| code | meaning |\n|---|---|\n| 0 | done |"
    for one in sorted(found, key=lambda one: one.exit_code):
        if "exit_code" in vars(one):
            yield f"| {one.exit_code} | {_text((one.__doc__ or '').partition(chr(10))[0])} |"
    yield ""


def recipe_keys() -> Iterator[str]:
    """Every key with its default, those of parts below it."""
    from featherweight.recipe.recipe import Recipe

    yield from _keys(Recipe, "")


def _keys(spec: type[BaseModel], above: str) -> Iterator[str]:
    for name, field in spec.model_fields.items():
        below = next(_specs(field.annotation), None)
        default = "required" if field.is_required() else "" if below or field.default is PydanticUndefined else repr(field.default)
        yield f"| `{above}{name}` | {_text(default)} |"
        if below is not None and not above.startswith(f"{name}."):
            yield from _keys(below, f"{above}{name}.")


def _specs(annotation: Any) -> Iterator[type[BaseModel]]:
    """The specs that a key holds."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _specs(inner)


def names() -> Iterator[str]:
    """What recipes name: quantization methods, pruning methods, engines."""
    from featherweight.pruning.catalog import PRUNERS
    from featherweight.quantization.catalog import QUANTIZERS
    from featherweight.runtimes.catalog import RUNTIMES

    for title, catalog in (("Quantization methods", QUANTIZERS), ("Pruning methods", PRUNERS), ("Engines", RUNTIMES)):
        yield f"## {title}\n\n{', '.join(f'`{name}`' for name in catalog.references)}\n"


def _text(text: str) -> str:
    """A cell of a table: one line, nothing in it that Markdown reads."""
    return re.sub(r"([|<>*_\[\]`])", r"\\\1", " ".join(text.split()))


def _reachable(body: str) -> str:
    """What Markdown made, its links among these pages, its tables with headings, and what scrolls reached by keys."""
    body = re.sub(r'href="(?:guide/)?([\w-]+)\.md', r'href="\1.html', body)
    body = body.replace("<th>", '<th scope="col">').replace("<pre>", '<pre tabindex="0">')
    return body.replace("<table>", '<div class="scroll" tabindex="0"><table>').replace("</table>", "</table></div>")


def build(folder: Path) -> list[Path]:
    """Write every page, and the style that the report has."""
    markdown, found = MarkdownIt("commonmark", {"html": False}).enable("table"), pages()
    titles = {name: html.escape((re.search(r"^# (.+)$", text, re.MULTILINE) or [name, name])[1]) for name, text in found.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "style.css").write_text(template_text("report.css") + template_text("browsing.css") + MORE)
    written = []
    for number, (name, text) in enumerate(found.items()):
        here = [(one, ' aria-current="page"' if one == name else "") for one in found]
        links = "".join(f'<li><a href="{one}.html"{mark}>{titles[one]}</a></li>' for one, mark in here)
        page = PAGE.format(title=titles[name], links=links, body=f"<section>{_reachable(markdown.render(text))}</section>")
        names = [folder / f"{name}.html", *([folder / "index.html"] if number == 0 else [])]
        written += [one for one in names if one.write_text(page)]
    return written


if __name__ == "__main__":
    print("\n".join(map(str, build(Path(sys.argv[1])))))
