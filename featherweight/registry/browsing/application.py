"""The server of the page: reading asks the registry and changes nothing, and every decision is one of `Decisions`."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import parse_qs, urlencode

from featherweight.errors import FeatherweightError, GateError, RecipeError, told
from featherweight.registry.auditing import audit_model
from featherweight.registry.browsing.access import Access, Guarded
from featherweight.registry.browsing.audits import Audits
from featherweight.registry.browsing.overview import ModelLine
from featherweight.registry.browsing.runs import SHOWN, optimizations, report_of
from featherweight.registry.history import WHY_LIMIT, GateResult
from featherweight.registry.lineage import of_version
from featherweight.registry.lineage_page import version_section
from featherweight.registry.promotion import Promotion
from featherweight.registry.registry import Registry
from featherweight.registry.versions import RegisteredModel
from featherweight.report.rendering import render_template, template_text

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

BODY_BYTES = 2**14
NOTES = 100
REPORT_PAGE = "sandbox allow-scripts; default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
"""A report may have been written by others: it is of no origin, so that its scripts reach neither our pages nor our cookie."""
STATUS = {GateError: 404, RecipeError: 400}


class Decisions(Protocol):
    """What a person decides here, by the functions behind the commands of the same names. Each raises what those raise."""

    def promote(self, reference: str, to: str, why: str, smoke: bool) -> Promotion:
        """Move a version to a stage, through its gates."""

    def approve(self, reference: str, why: str, refuse: bool, smoke: bool) -> Promotion:
        """Approve a version that waits, or refuse it."""

    def roll_back(self, model: str, why: str) -> Promotion:
        """Make the champion before the present one champion again."""


@dataclass(frozen=True)
class Note:
    """What came of a decision: one sentence, and the gates that judged."""

    good: bool
    text: str
    gates: tuple[GateResult, ...] = ()


@dataclass
class Page:
    """The pages of one registry. links: names and addresses of other pages, '' for one that is still starting; asked each time."""

    registry: Registry
    decisions: Decisions
    access: Access
    place: str
    links: Callable[[], Mapping[str, str]] = dict

    def __post_init__(self) -> None:
        self._audits = Audits(lambda model: audit_model(self.registry, model))
        self._notes: OrderedDict[str, Note] = OrderedDict()
        self._one_at_a_time = threading.Lock()

    def application(self) -> Guarded:
        """The ASGI application."""
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.routing import Route

        reading = {"/": self.home, "/model": self.model, "/version": self.version, "/report": self.report, "/style.css": self.style}
        deciding = {"/promote": self.promote, "/approve": self.approve, "/rollback": self.roll_back, "/audit": self.audit}
        routes = [Route(path, answer) for path, answer in reading.items()]
        routes += [Route(path, self._form(answer), methods=["POST"]) for path, answer in deciding.items()]
        handlers: Any = {FeatherweightError: self._refused, HTTPException: self._no_such_page, Exception: self._failed}
        return Guarded(Starlette(routes=routes, exception_handlers=handlers), self.access)

    # -- reading ----------------------------------------------------------------------------------------------------------

    def home(self, asked: Request) -> Response:
        """All models and all optimizations."""
        models = [ModelLine.of(one) for one in self.registry.all_models()]
        runs = optimizations(self.registry.client, self.registry.tracking_uri)
        made = {one.run_id: (model, one) for model in models for one in model.versions}
        return self._page("overview.html.j2", asked, models=models, runs=runs, shown=SHOWN, made=made, audits=self._audits)

    def model(self, asked: Request) -> Response:
        """One model: who stands where, its versions, its history, its audit, and what may be decided."""
        line = ModelLine.of(self.registry.model(asked.query_params.get("name", "")))
        return self._page("model.html.j2", asked, model=line, audit=self._audits.of(line.name))

    def version(self, asked: Request) -> Response:
        """One version: its lineage, figures and history, and what may be decided about it."""
        seen = self.registry.model(asked.query_params.get("model", ""))
        line, picked = ModelLine.of(seen), seen.pick(asked.query_params.get("number", ""))
        shown = next(one for one in line.versions if one.number == picked.version)
        audit = self._audits.of(line.name)
        try:
            lineage, fault = version_section(of_version(self.registry, seen, picked), audit.findings if audit else ()), ""
        except FeatherweightError as error:
            lineage, fault = None, told(error)
        return self._page("version.html.j2", asked, model=line, shown=shown, version=lineage, fault=fault)

    def report(self, asked: Request) -> Response:
        """The report that an optimization logged, as a page of no origin."""
        from starlette.responses import HTMLResponse

        page = report_of(self.registry.client, self.registry.tracking_uri, asked.query_params.get("run", ""))
        return HTMLResponse(page, headers={"content-security-policy": REPORT_PAGE})

    def style(self, asked: Request) -> Response:
        """The report's style, and what these pages add."""
        from starlette.responses import Response

        return Response(template_text("report.css") + template_text("browsing.css"), media_type="text/css")

    # -- deciding ---------------------------------------------------------------------------------------------------------

    def promote(self, seen: RegisteredModel, form: Mapping[str, str]) -> Note:
        """Move a version to a stage."""
        reference = f"{seen.model}/{seen.pick(form.get('version', '')).version}"
        return _noted(self.decisions.promote(reference, form.get("to", ""), form.get("why", ""), "smoke" in form))

    def approve(self, seen: RegisteredModel, form: Mapping[str, str]) -> Note:
        """Approve a version that waits, or refuse it."""
        reference, refuse = f"{seen.model}/{seen.pick(form.get('version', '')).version}", form.get("answer") == "refuse"
        if form.get("answer") not in ("approve", "refuse"):
            raise RecipeError("say whether it is approved or refused")
        return _noted(self.decisions.approve(reference, form.get("why", ""), refuse, "smoke" in form))

    def roll_back(self, seen: RegisteredModel, form: Mapping[str, str]) -> Note:
        """Make the champion before the present one champion again."""
        return _noted(self.decisions.roll_back(seen.model, form.get("why", "")))

    def audit(self, seen: RegisteredModel, form: Mapping[str, str]) -> Note:
        """Begin an audit."""
        self._audits.begin(seen.model, seen.history.head)
        return Note(True, "The audit reads everything that is stored of the model; its verdict comes below.")

    def _form(self, decide: Callable[[RegisteredModel, Mapping[str, str]], Note]) -> Any:
        """The endpoint of a form: decide, keep what came of it, and lead back to the model's page, which tells it."""

        async def endpoint(asked: Request) -> Response:
            from starlette.concurrency import run_in_threadpool
            from starlette.responses import PlainTextResponse, RedirectResponse

            form = await _fields(asked)
            if form is None or not self.access.own_form(form.get("form", "")):
                return PlainTextResponse("this form is not of this page, or of an earlier start of it: load the page again\n", 403)
            note = await run_in_threadpool(self._decided, decide, form)
            key = secrets.token_urlsafe(9)
            self._notes[key] = note
            while len(self._notes) > NOTES:
                self._notes.popitem(last=False)
            return RedirectResponse(f"/model?{urlencode({'name': form.get('model', ''), 'told': key})}", 303)

        return endpoint

    def _decided(self, decide: Callable[[RegisteredModel, Mapping[str, str]], Note], form: Mapping[str, str]) -> Note:
        """What came of a form; one at a time, and only while the history is the one that its page has shown."""
        with self._one_at_a_time:
            try:
                seen = self.registry.model(form.get("model", ""))
                if form.get("head") != str(seen.history.head):
                    return Note(
                        False, f"Nothing was decided: the history went on since the page was shown{_last(seen)}. Look again."
                    )
                return decide(seen, form)
            except FeatherweightError as error:
                return Note(False, told(error), getattr(error, "gates", ()))
            except Exception as error:  # an engine that is asked whether it answers raises what it likes
                return Note(False, f"It failed: {told(error)}")

    # -- answers ----------------------------------------------------------------------------------------------------------

    def _page(self, template: str, asked: Request, status: int = 200, **values: Any) -> Response:
        from starlette.responses import HTMLResponse

        shared = {"links": self.links(), "place": self.place, "form": self.access.form, "why_limit": WHY_LIMIT}
        note = self._notes.get(asked.query_params.get("told", ""))
        page = render_template(template, **shared, note=note, address=_address, **values)
        return HTMLResponse(page, status)

    def _refused(self, asked: Request, error: Any) -> Response:
        return self._page("refused.html.j2", asked, STATUS.get(type(error), 503), title="This cannot be shown", text=told(error))

    def _no_such_page(self, asked: Request, error: Any) -> Response:
        return self._page("refused.html.j2", asked, error.status_code, title=error.detail, text="There is nothing here.")

    def _failed(self, asked: Request, error: Any) -> Response:
        return self._page("refused.html.j2", asked, 500, title="This failed", text=told(error))


def _noted(done: Promotion) -> Note:
    return Note(True, done.to_text().partition("\n")[0], done.gates)


def _last(seen: RegisteredModel) -> str:
    return f" ({seen.history.entries[-1].told()})" if seen.history.entries else ""


def _address(path: str, **query: str) -> str:
    """A link, whatever a model is called."""
    return f"{path}?{urlencode(query)}"


async def _fields(asked: Request) -> dict[str, str] | None:
    """The fields of a form, None for what is no form of ours: longer, of another type, of more fields, or with one twice."""
    if asked.headers.get("content-type", "").partition(";")[0] != "application/x-www-form-urlencoded":
        return None
    body = b""
    async for part in asked.stream():
        body += part
        if len(body) > BODY_BYTES:
            return None
    try:
        found = parse_qs(body.decode("utf-8", "replace"), max_num_fields=20)
    except ValueError:
        return None
    return {name: values[0] for name, values in found.items()} if all(len(values) == 1 for values in found.values()) else None
