"""Pages from the templates of this folder."""

from __future__ import annotations

from importlib.resources import files
from typing import Any


def render_template(name: str, **values: Any) -> str:
    """The template with its values, escaped unless it says otherwise; what UTF-8 has not is an escape."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("featherweight.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(name).render(**values).encode(errors="backslashreplace").decode()


def template_text(name: str) -> str:
    """A file of the templates' folder as it is."""
    return files("featherweight.report").joinpath("templates", name).read_text(encoding="utf-8")
