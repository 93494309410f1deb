"""The history of a registered model in MLflow: versions of a second model, numbered by the server and never written again.

An MLflow server creates a version and its tags in one transaction, under a number that it gives to nobody else: the atomic
step that `commit` builds on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import NoneType
from typing import TYPE_CHECKING, Any

from featherweight.errors import Forbidden, GateError, IntegrityError, one_line
from featherweight.registry.commit import Cell, Unsure
from featherweight.registry.history import ENTRY_LIMIT, Entry
from featherweight.registry.keys import Keys
from featherweight.registry.versions import MARK, NAME, TAG, RegisteredModel
from featherweight.registry.vouching import unvouched
from featherweight.registry.witness import seen_from_here
from featherweight.spec import HISTORY_SUFFIX
from featherweight.store.mlflow_errors import NO_RIGHT

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.entities.model_registry import RegisteredModel as MlflowModel

ENTRY = f"{TAG}entry"
SIGNED = f"{TAG}entry_signature"
QUARANTINED = f"{TAG}quarantined."
HISTORY = f"{TAG}history"
HISTORY_OF = f"{TAG}history_of"
SOURCE = "featherweight:/history"
WITHOUT_STAGES = ("FEATURE_DISABLED", "ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED")
CLASHED = "BAD_REQUEST"
CLASHES = 8
MAYBE_WRITTEN = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED")


class MlflowStore:
    """One registered model, and the model `NAME.history` beside it, through MLflow's client."""

    def __init__(self, client: MlflowClient, model: str) -> None:
        self.client, self.model = client, model
        self._has_stages = True
        self._history = ""
        self._signed = False

    def read(self) -> RegisteredModel:
        """The model as it stands. Raises GateError, naming the known ones, where there is none."""
        holder = self._holder()
        found = list(_sound(all_pages(self.client.search_model_versions, filter_string=f"name = '{holder.name}'")))
        entries = _readable_entries(self.client, holder, self._history, list(self._entries()))
        self._signed = any(one.tags.get(SIGNED) for one in entries)
        return _model(holder, found, entries, self._has_stages)

    def signatures(self) -> dict[int, tuple[str, str]]:
        """Text and signature ('' where there is none) of each stored entry, by number."""
        self._holder()
        return _signed(self._entries())

    def kept_in(self) -> MlflowModel | None:
        """The registered model that holds the entries, None where there is none (any more)."""
        from mlflow.exceptions import MlflowException

        self._holder()
        try:
            return self.client.get_registered_model(self._history)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def quarantine(self) -> list[int]:
        """Delete the versions whose entry cannot be read, or decides though no trusted key signed it; returns their numbers.

        Their text is kept in tags of the model.
        """
        unvouched = self.read().unvouched
        out = [one for one in self._entries() if int(one.version) in unvouched or not _readable(one)]
        for one in out:
            text = one.tags.get(ENTRY, "")[:ENTRY_LIMIT]
            set_once(self.client.set_registered_model_tag, self.model, f"{QUARANTINED}{one.version}", text)
            self.client.delete_model_version(self._history, one.version)
        return [int(one.version) for one in out]

    def _entries(self) -> Iterator[ModelVersion]:
        query = {"filter_string": f"name = '{self._history}'", "order_by": ["version_number ASC"]}  # what is appended comes last
        return _sound(all_pages(self.client.search_model_versions, **query))

    def append(self, entry: Entry) -> None:
        """Create the version that holds the entry; the model of versions first, where there is none yet.

        Raises Forbidden where the last look showed signed entries and this user has no key: nobody who trusts one would believe it.
        """
        from mlflow.exceptions import MlflowException

        text = entry.to_json()
        signature = self.signed(text)
        tags, told = {ENTRY: text, **({SIGNED: signature} if signature else {})}, f"{entry.when[:19]}Z: {entry.told()}"
        try:
            if not entry.follows:
                self._begin()
            self.client.create_model_version(self._history, SOURCE, tags=tags, description=told, await_creation_for=0)
        except MlflowException as error:
            if error.error_code not in MAYBE_WRITTEN:
                raise
            raise Unsure(f"MLflow failed while it stored a history entry: {one_line(error)}") from error

    def signed(self, text: str) -> str:
        """This user's signature of an entry, '' without a key. Raises Forbidden as `append` does."""
        signature = Keys.here().sign(text)
        if self._signed and not signature:
            way = "`featherweight keys init`, and let the others trust its public key"
            raise Forbidden(
                f"entries of '{self.model}' are signed; one of this user, who has no key, would stop whoever trusts keys: {way}"
            )
        return signature

    def write(self, cell: Cell, value: str | None) -> None:
        """Set one cell; nothing where the version that it belongs to was deleted meanwhile."""
        from mlflow.exceptions import MlflowException

        try:
            set_once(self._write, cell, value)
        except MlflowException as error:
            if cell.kind == "stage" and error.error_code in WITHOUT_STAGES:
                self._has_stages = False
            elif error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise

    def _write(self, cell: Cell, value: str | None) -> None:
        if cell.kind == "alias" and value is None:
            self.client.delete_registered_model_alias(self.model, cell.name)
        elif cell.kind == "alias":
            self.client.set_registered_model_alias(self.model, cell.name, str(value))
        elif cell.kind == "mark":
            self.client.set_registered_model_tag(self.model, MARK, value)
        elif cell.kind == "tag":
            self.client.set_model_version_tag(self.model, cell.name, f"{TAG}stage", value)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                self.client.transition_model_version_stage(self.model, cell.name, str(value))

    def _holder(self) -> MlflowModel:
        """MLflow's registered model, and with it the name of the one that holds its history."""
        from mlflow.exceptions import MlflowException

        try:
            holder = self.client.get_registered_model(self.model)
            self._history = holder.tags.get(HISTORY) or f"{holder.name}{HISTORY_SUFFIX}"
            return holder
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            refuse_renamed(self.client, self.model)
            known = ", ".join(sorted(one.name for one in served_models(self.client))) or "none"
            raise GateError(f"no registered model '{self.model}'; registered: {known}") from error

    def _begin(self) -> None:
        """The model that will hold the history, and its name in a tag of the first, which stays where MLflow renames that."""
        about = f"The history of '{self.model}', kept by Featherweight: one version an entry. Nothing to serve; do not edit."
        create_model(self.client, self._history, {HISTORY_OF: self.model}, about)
        set_once(self.client.set_registered_model_tag, self.model, HISTORY, self._history)


def _sound(found: Iterable[ModelVersion]) -> Iterator[ModelVersion]:
    """Versions as they were found. Raises IntegrityError at one that MLflow would not have written: by hand, into its database."""
    for one in found:
        if not str(one.version).isdecimal() or not isinstance(one.creation_timestamp, int | NoneType):
            told = f"version {one.version!r}, created at {one.creation_timestamp!r}"
            raise IntegrityError(f"a version of '{one.name}' was altered in MLflow's database: {told}; restore it from a backup")
        yield one


def _readable_entries(client: MlflowClient, holder: MlflowModel, history: str, entries: list[ModelVersion]) -> list[ModelVersion]:
    """The entries that a search found. Raises Forbidden where it left them out because this user may not read them."""
    from mlflow.exceptions import MlflowException

    if entries or MARK not in holder.tags:
        return entries
    try:
        client.get_registered_model(history)
    except MlflowException as error:
        if error.error_code == NO_RIGHT:
            way = "ask its administrator for READ on it, or set other MLFLOW_TRACKING_USERNAME"
            raise Forbidden(f"MLflow does not let this user read '{history}', which holds what was decided; {way}") from error
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
    return entries


def _signed(entries: Iterable[ModelVersion]) -> dict[int, tuple[str, str]]:
    """Text and signature of each stored entry, by number."""
    return {int(entry.version): (entry.tags.get(ENTRY, ""), entry.tags.get(SIGNED, "")) for entry in entries}


def _model(
    holder: MlflowModel, found: Sequence[ModelVersion], entries: Sequence[ModelVersion], has_stages: bool = True
) -> RegisteredModel:
    """A model of all that MLflow holds of it, and which of its entries no trusted key vouches for."""
    stored, keys = _signed(entries), Keys.here()
    seen = RegisteredModel.of(holder, found, {number: text for number, (text, _) in stored.items()}, has_stages)
    return seen.vouched_for(unvouched(seen.history, stored, keys, seen_from_here(seen.born, seen.history, keys)))


def _readable(found: ModelVersion) -> bool:
    try:
        Entry.from_json(found.tags.get(ENTRY, ""), int(found.version))
    except IntegrityError:
        return False
    return True


def create_model(client: MlflowClient, name: str, tags: dict[str, str] | None = None, about: str | None = None) -> None:
    """A registered model of that name, unless it is there."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, tags, about)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def set_once(write: Callable[..., object], *arguments: object) -> None:
    """Call a write of MLflow's that sets or removes one row, again where another writer's came between its look and its own.

    MLflow's stores read a row and then insert, change or remove it, so that of two writers the second can fail (`BAD_REQUEST`,
    with the database's words: a key that is there already, a row that is gone). Where it looks again, it finds the other's.
    """
    from mlflow.exceptions import MlflowException

    for left in reversed(range(CLASHES)):
        try:
            write(*arguments)
            return
        except MlflowException as error:
            if error.error_code != CLASHED or not left:
                raise


def read_all(client: MlflowClient) -> list[RegisteredModel]:
    """All registered models, those that hold histories beside those that they are of."""
    versions: dict[str, list[ModelVersion]] = {}
    for one in _sound(all_pages(client.search_model_versions)):
        versions.setdefault(one.name, []).append(one)
    holders = served_models(client)
    names = {one.name: one.tags.get(HISTORY) or f"{one.name}{HISTORY_SUFFIX}" for one in holders}
    entries = {one.name: _readable_entries(client, one, names[one.name], versions.get(names[one.name], [])) for one in holders}
    return [_model(one, versions.get(one.name, []), entries[one.name]) for one in holders]


def served_models(client: MlflowClient) -> list[MlflowModel]:
    """All registered models but those that hold histories, which we never name as served: no other tag hides one from audits."""
    return [one for one in all_pages(client.search_registered_models) if NAME in one.tags or not _holds_history(one)]


def _holds_history(model: MlflowModel) -> bool:
    return HISTORY_OF in model.tags or model.name.endswith(HISTORY_SUFFIX)


def refuse_renamed(client: MlflowClient, model: str) -> None:
    """Raise GateError where a model of another name was registered under `model`."""
    for one in served_models(client):
        if one.tags.get(NAME) == model and one.name != model:
            way = f"rename it back, or write `promote: {{model: {one.name}}}` in the recipe and use that name"
            raise GateError(f"the registered model '{model}' was renamed to '{one.name}' in MLflow; {way}")


def all_pages(search: Any, **query: Any) -> Iterator[Any]:
    """All results of a paged MLflow search."""
    token = None
    while True:
        page = search(page_token=token, **query)
        yield from page
        token = page.token
        if not token:
            return
