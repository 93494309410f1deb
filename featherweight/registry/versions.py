"""One registered model: its versions, who is champion, and what may be done about it.

The aliases champion, challenger and previous are the truth, because MLflow's own stages are deprecated; tags say the stage too, and
MLflow's stage is set where the server still has stages.
"""

from __future__ import annotations

import json
import random
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from featherweight.errors import GateError, ServiceError
from featherweight.registry import history
from featherweight.registry.history import Action, GateResult, Transition

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
HELD = {"production": CHAMPION, "staging": CHALLENGER}
BELOW = {"production": "archived", "staging": "none"}
TAG = "featherweight."
LOCK = f"{TAG}lock."
NAME = f"{TAG}name"
LEASE_S = 60.0


@dataclass(frozen=True)
class RegisteredVersion:
    """A registered version as the registry holds it. `new` is False where registering found that the digest was there."""

    model: str
    version: str
    stage: str
    aliases: tuple[str, ...]
    run_id: str
    source: str
    tags: Mapping[str, str]
    created_s: float
    new: bool = False

    @classmethod
    def of(cls, found: ModelVersion, aliases: Mapping[str, str]) -> RegisteredVersion:
        """MLflow's version, with the stage that its aliases give it, or else its tag."""
        mine = tuple(sorted(alias for alias, number in aliases.items() if number == str(found.version)))
        held = [stage for stage, alias in HELD.items() if alias in mine]
        tagged = "archived" if found.tags.get(f"{TAG}stage") == "archived" else "none"
        return cls(
            model=found.name,
            version=str(found.version),
            stage=held[0] if held else tagged,
            aliases=mine,
            run_id=found.run_id or "",
            source=found.source or "",
            tags=dict(found.tags),
            created_s=found.creation_timestamp / 1000,
        )

    @property
    def uri(self) -> str:
        """What `mlflow.pyfunc.load_model` takes."""
        return f"models:/{self.model}/{self.version}"

    @property
    def digest(self) -> str:
        """Digest of the served artifact."""
        return self.tag("digest")

    @property
    def variant(self) -> str:
        """Name of the variant."""
        return self.tag("variant")

    @property
    def metrics(self) -> dict[str, float]:
        """The measurement, as it was when the version was registered."""
        return json.loads(self.tag("metrics") or "{}")

    def tag(self, name: str) -> str:
        """A Featherweight tag of the version, '' where it has none."""
        return self.tags.get(f"{TAG}{name}", "")


class RegisteredModel:
    """A registered model as it stands, read in two calls. Write to it only within `locked`."""

    def __init__(
        self,
        client: MlflowClient,
        model: str,
        aliases: dict[str, str],
        tags: dict[str, str],
        versions: dict[str, RegisteredVersion],
    ) -> None:
        self.client, self.model, self.aliases, self.tags, self.versions = client, model, aliases, tags, versions

    @classmethod
    def read(cls, client: MlflowClient, model: str) -> RegisteredModel:
        """The model of that name. Raises GateError, naming the known ones, where there is none."""
        from mlflow.exceptions import MlflowException

        try:
            holder = client.get_registered_model(model)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            refuse_renamed(client, model)
            known = ", ".join(sorted(one.name for one in all_pages(client.search_registered_models))) or "none"
            raise GateError(f"no registered model '{model}'; registered: {known}") from error
        aliases = {alias: str(number) for alias, number in holder.aliases.items()}
        found = all_pages(client.search_model_versions, filter_string=f"name = '{holder.name}'")
        ordered = sorted((RegisteredVersion.of(one, aliases) for one in found), key=lambda one: int(one.version))
        return cls(client, model, aliases, dict(holder.tags), {one.version: one for one in ordered})

    @property
    def history(self) -> list[Transition]:
        """Every transition, oldest first."""
        return history.read(self.tags)

    def pick(self, version: str) -> RegisteredVersion:
        """A version by number or alias. Raises GateError, naming the known ones, where there is none."""
        number = self.aliases.get(version, version)
        found = self.versions.get(number)
        if found is None and version in self.aliases:
            left = ", ".join(self.versions) or "none"
            way = f"promote another (`featherweight promote {self.model}/NUMBER`; versions: {left}), or roll back"
            raise GateError(f"version {number} of '{self.model}', its {version}, was deleted in MLflow; {way}")
        if found is None:
            known = f"versions: {', '.join(self.versions) or 'none'}; aliases: {', '.join(sorted(self.aliases)) or 'none'}"
            raise GateError(f"model '{self.model}' has no version or alias '{version}'; {known}")
        return found

    def holder(self, alias: str) -> RegisteredVersion | None:
        """The version that an alias names, None where there is none any more: some servers keep the alias of a deleted version."""
        return self.versions.get(self.aliases.get(alias, ""))

    def move(self, moved: RegisteredVersion, to: str, who: str, why: str, gates: Sequence[GateResult]) -> None:
        """Move a version to a stage, and whoever stands there to the stage below.

        Entries are written before the aliases move, so that no promotion goes unrecorded; the new alias is set before the old
        ones go, so that there is a champion at every moment.
        """
        out = self.holder(HELD[to]) if to in HELD else None
        self._record(moved, to, who, why, "transition", gates)
        if out is not None:
            self._record(out, BELOW[to], who, f"displaced by version {moved.version}", "displaced")
            if to == "production":
                self._set_alias(PREVIOUS, out)
        self._give_alias(moved, to)
        if out is not None:
            self._tag_stage(out, BELOW[to])

    def roll_back(self, who: str, why: str) -> None:
        """Make `previous` champion, and the champion before it `previous`. Raises GateError where there is no previous one."""
        back, champion = self.pick(PREVIOUS) if PREVIOUS in self.aliases else None, self.holder(CHAMPION)
        if back is None:
            raise GateError(f"model '{self.model}' has no previous champion to go back to")
        if champion is not None:
            self._record(champion, "archived", who, why, "rollback")
        self._record(back, "production", who, why, "rollback")
        self._give_alias(back, "production")
        if champion is not None:
            self._tag_stage(champion, "archived")
        line = [one for one in history.champions(self.history) if one in self.versions and one != back.version]
        if line:
            self._set_alias(PREVIOUS, self.versions[line[-1]])

    def _record(
        self,
        moved: RegisteredVersion,
        to: str,
        who: str,
        why: str,
        action: Action,
        gates: Sequence[GateResult] = (),
    ) -> None:
        entry = Transition("", who, why, action, moved.version, moved.digest, moved.stage, to, tuple(gates))
        key, value = history.follow(entry, self.history).as_tag()
        self.client.set_registered_model_tag(self.model, key, value)
        self.tags[key] = value

    def _give_alias(self, moved: RegisteredVersion, to: str) -> None:
        """Let the version hold the alias of its stage and no other."""
        if to in HELD:
            self._set_alias(HELD[to], moved)
        gone = {CHAMPION, CHALLENGER, *([PREVIOUS] if to == "production" else [])} - {HELD.get(to)}
        for alias in gone:
            if self.aliases.get(alias) == moved.version:
                self.client.delete_registered_model_alias(self.model, alias)
                del self.aliases[alias]
        self._tag_stage(moved, to)

    def _set_alias(self, alias: str, version: RegisteredVersion) -> None:
        self.client.set_registered_model_alias(self.model, alias, version.version)
        self.aliases[alias] = version.version

    def _tag_stage(self, moved: RegisteredVersion, stage: str) -> None:
        """Say the stage in a tag, and in MLflow's own stage where the server still has stages."""
        from mlflow.exceptions import MlflowException

        self.client.set_model_version_tag(self.model, moved.version, f"{TAG}stage", stage)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            try:
                self.client.transition_model_version_stage(self.model, moved.version, stage.capitalize())
            except MlflowException as error:
                if error.error_code not in ("FEATURE_DISABLED", "ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED"):
                    raise


def refuse_renamed(client: MlflowClient, model: str) -> None:
    """Raise GateError where a model of another name was registered under `model`."""
    for one in all_pages(client.search_registered_models):
        if one.tags.get(NAME) == model and one.name != model:
            way = f"rename it back, or write `promote: {{model: {one.name}}}` in the recipe and use that name"
            raise GateError(f"the registered model '{model}' was renamed to '{one.name}' in MLflow; {way}")


@contextmanager
def locked(client: MlflowClient, model: str, patience_s: float = 30.0) -> Iterator[RegisteredModel]:
    """The model as it stands, locked, so that reading the champion and moving the aliases is one step among all writers.

    MLflow has no compare-and-set. A writer sets a tag of its own, then looks: it holds the lock if it sees no other.
    Of two writers at least the later one sees the other's tag, so never both hold it; on a clash both remove theirs
    and try again after a random pause. A tag left by a killed writer counts for LEASE_S only. Raises GateError for an
    unknown model, ServiceError where the lock stays taken for `patience_s`.
    """
    RegisteredModel.read(client, model)
    mine, end = f"{LOCK}{uuid.uuid4().hex}", time.monotonic() + patience_s
    while not _try_lock(client, model, mine):
        if time.monotonic() > end:
            raise ServiceError(f"another promotion of '{model}' has been under way for {patience_s:.0f} s; try again")
        time.sleep(random.uniform(0.02, 0.3))
    try:
        yield RegisteredModel.read(client, model)
    finally:
        client.delete_registered_model_tag(model, mine)


def _try_lock(client: MlflowClient, model: str, mine: str) -> bool:
    """Set this writer's tag; remove it again and say False where another one is set."""
    client.set_registered_model_tag(model, mine, str(time.time() + LEASE_S))
    tags = client.get_registered_model(model).tags
    others = {key: float(until) for key, until in tags.items() if key.startswith(LOCK) and key != mine}
    for key in [key for key, until in others.items() if until < time.time()]:
        client.delete_registered_model_tag(model, key)
        del others[key]
    if others:
        client.delete_registered_model_tag(model, mine)
    return not others


def all_pages(search: Any, **query: Any) -> Iterator[Any]:
    """All results of a paged MLflow search."""
    token = None
    while True:
        page = search(page_token=token, **query)
        yield from page
        token = page.token
        if not token:
            return


def parse_reference(reference: str, default: str) -> tuple[str, str]:
    """'name', 'name@alias', 'name/3' or either with 'models:/' in front: (name, alias or number)."""
    plain = reference.removeprefix("models:/")
    for mark in ("@", "/"):
        name, found, version = plain.partition(mark)
        if found:
            return name, version
    return plain, default
