"""The registry: winners as registered model versions, their promotion, and the history of it, all held by MLflow."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from featherweight import history
from featherweight.errors import FeatherweightError, GateError, ServiceError
from featherweight.history import Action, GateResult, StageName, Transition
from featherweight.model_folder import LINEAGE, SERVED, link_tree, write_model_folder
from featherweight.serving import Serving
from featherweight.workspace import local_path

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
TAG = "featherweight."
LOCK = f"{TAG}lock."
LEASE_S = 60.0

__all__ = ["GateResult", "RegisteredVersion", "Registry", "Transition", "WinnerRecord"]


@dataclass(frozen=True)
class WinnerRecord:
    """What an optimization hands to the registry: a served folder, its digest, and everything known of it.

    served: the artifact's folder, `serving.json` at its root. run_id: the optimization's parent run.
    metrics: the variant's measurement. lineage: JSON of a featherweight.lineage.LineageGraph.
    checkpoint, evaluation: digests of the checkpoint it was made from and of the text it was measured on.
    constraints, objective: the recipe's, so that promotion can judge by the registry alone.
    threads, max_tokens: how the engine is opened when the model is loaded.
    model_id: the variant's LoggedModel (`Registry.log_variant`), to hold the weights; made here if not given.
    """

    model: str
    variant: str
    digest: str
    served: Path
    run_id: str
    metrics: Mapping[str, float]
    lineage: str
    recipe: str = ""
    checkpoint: str = ""
    evaluation: str = ""
    machine: str = ""
    constraints: Mapping[str, float] = field(default_factory=dict)
    objective: str = "speedup@1"
    threads: int = 1
    max_tokens: int = 512
    model_id: str | None = None


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

    @property
    def uri(self) -> str:
        """What `mlflow.pyfunc.load_model` takes."""
        return f"models:/{self.model}/{self.version}"

    @property
    def digest(self) -> str:
        """Digest of the served artifact."""
        return self.tags.get(f"{TAG}digest", "")

    @property
    def variant(self) -> str:
        """Name of the variant."""
        return self.tags.get(f"{TAG}variant", "")

    @property
    def metrics(self) -> dict[str, float]:
        """The measurement, as it was when the version was registered."""
        return json.loads(self.tags.get(f"{TAG}metrics", "{}"))

    def tag(self, name: str) -> str:
        """A Featherweight tag of the version, '' where it has none."""
        return self.tags.get(f"{TAG}{name}", "")


class Registry:
    """MLflow's tracking and registry API at one URI. Every method raises ServiceError where MLflow cannot be reached."""

    def __init__(self, tracking_uri: str) -> None:
        self.tracking_uri = tracking_uri

    @cached_property
    def client(self) -> MlflowClient:
        """The client, of this URI only: nothing global is set."""
        from mlflow import MlflowClient

        with self._service():
            return MlflowClient(self.tracking_uri, self.tracking_uri)

    def check(self) -> None:
        """Raise ServiceError within seconds where the server is down, hangs, or refuses the credentials."""
        if self.tracking_uri.startswith(("http://", "https://")):
            _ping(self.tracking_uri)
        with self._service():
            self.client.search_registered_models(max_results=1)

    # -- what is there ------------------------------------------------------------------------------------------------

    def models(self) -> list[str]:
        """Names of all registered models."""
        with self._service():
            return sorted(model.name for model in _pages(self.client.search_registered_models))

    def get(self, model: str, version: str) -> RegisteredVersion:
        """A version by number or alias. Raises GateError where there is none."""
        holder = self._model(model)
        number = holder.aliases.get(version, version)
        found = [one for one in self._versions(holder) if one.version == str(number)]
        if not found:
            raise GateError(f"model '{model}' has no version or alias '{version}'; {self._known_versions(holder)}")
        return found[0]

    def versions(self, model: str) -> list[RegisteredVersion]:
        """All versions of a model, oldest first."""
        return self._versions(self._model(model))

    def champion(self, model: str) -> RegisteredVersion | None:
        """The version in production, None where there is none."""
        return self._by_alias(self._model(model), CHAMPION)

    def find(self, model: str, digest: str) -> RegisteredVersion | None:
        """The version that serves the artifact of that digest."""
        return next((one for one in self.versions(model) if one.digest == digest), None)

    def history(self, model: str) -> list[Transition]:
        """Every transition of the model's versions, oldest first."""
        return history.read(self._model(model).tags)

    def history_faults(self, model: str) -> list[str]:
        """Entries of the history that were altered or removed by other hands, in words."""
        return history.faults(self._model(model).tags)

    def lineage_json(self, version: RegisteredVersion) -> str:
        """The `lineage.json` that was registered with a version."""
        local = local_path(version.source)
        with self._service(), tempfile.TemporaryDirectory() as folder:
            got = local / LINEAGE if local else self._artifacts(version.source).download_artifacts(LINEAGE, folder)
            return Path(got).read_text(encoding="utf-8")

    def download(self, uri: str, folder: Path) -> Path:
        """An artifact folder of a remote store, downloaded into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        with self._service():
            return Path(self._artifacts(uri).download_artifacts("", str(folder)))

    def served_folder(self, version: RegisteredVersion, folder: Path) -> Path:
        """The served files of a version: where they lie on a local store, else downloaded into `folder`."""
        local = local_path(version.source)
        if local is not None:
            return local / SERVED
        with self._service():
            return Path(self._artifacts(version.source).download_artifacts(SERVED, str(folder)))

    # -- what is written ----------------------------------------------------------------------------------------------

    def log_variant(
        self,
        run_id: str,
        name: str,
        metrics: Mapping[str, float],
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> str:
        """Log a variant as a LoggedModel of the run, with its metrics; returns its id. Holds no files until it wins."""
        from mlflow.entities import Metric

        with self._service():
            model = self._create_logged_model(run_id, name, params or {}, {**(tags or {}), f"{TAG}variant": name})
            now = int(time.time() * 1000)
            numbers = [Metric(key, value, now, 0, model_id=model.model_id) for key, value in metrics.items()]
            self.client.log_batch(run_id, numbers)
            self.client.finalize_logged_model(model.model_id, "READY")
            return model.model_id

    def register(self, winner: WinnerRecord) -> RegisteredVersion:
        """Register a winner as a new version; the version that is there already where its digest is registered.

        The served files are hard-linked into a local artifact store, uploaded to a remote one. Nothing is left behind
        on failure. Raises ServiceError, or IntegrityError where the folder is not a served variant.
        """
        _check_name(winner.model)
        engine = Serving.read(winner.served).engine
        self.check()
        self._ensure_model(winner.model)
        known = self.find(winner.model, winner.digest)
        if known is not None:
            return known
        with self._service():
            logged = self._log_files(winner, engine)
            try:
                return self._create_version(winner, engine, logged)
            except BaseException:
                self._discard(winner, logged)
                raise

    def transition(
        self,
        model: str,
        version: str,
        to: StageName,
        *,
        who: str,
        why: str,
        gates: Sequence[GateResult] = (),
        expect_champion: str | None = None,
    ) -> RegisteredVersion:
        """Move a version to a stage and append that to the history; nothing happens where it stands there already.

        The aliases champion, challenger and previous are the truth. A displaced champion is archived and becomes `previous`,
        a displaced challenger goes back to none. The entry is written before the aliases move, so that no promotion can
        go unrecorded. expect_champion: the version number that the gates compared with, '' for none: GateError where another
        has become champion meanwhile. None does not look.
        """
        _check_words(to, who, why)
        with self._exclusive(model):
            holder = self._model(model)
            moved, champion = self.get(model, version), self._by_alias(holder, CHAMPION)
            present = champion.version if champion else ""
            if expect_champion is not None and present != expect_champion:
                raise GateError(f"version {present or 'none'} of '{model}' became champion meanwhile; promote again")
            if moved.stage == to:
                return moved
            self._append(holder, moved, to, who, why, "transition", gates)
            self._displace(holder, moved, to, who)
            self._place(moved, to)
        return self.get(model, moved.version)

    def rollback(self, model: str, who: str, why: str) -> RegisteredVersion:
        """Make the champion before the present one champion again; a second rollback goes one further back.

        Raises GateError where there is no champion to go back to.
        """
        _check_words("production", who, why)
        with self._exclusive(model):
            holder = self._model(model)
            back, champion = self._by_alias(holder, PREVIOUS), self._by_alias(holder, CHAMPION)
            if back is None:
                raise GateError(f"model '{model}' has no previous champion to go back to")
            if champion is not None:
                self._append(holder, champion, "archived", who, why, "rollback")
            self._append(holder, back, "production", who, why, "rollback")
            self._place(back, "production")
            if champion is not None:
                self._label(champion, "archived")
            self._point_previous_below(model, back.version)
        return self.get(model, back.version)

    # -- how ------------------------------------------------------------------------------------------------------------

    def _model(self, model: str) -> RegisteredModel:
        from mlflow.exceptions import MlflowException

        with self._service():
            try:
                return self.client.get_registered_model(model)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                known = ", ".join(self.models()) or "none"
                raise GateError(f"no registered model '{model}'; registered: {known}") from error

    def _versions(self, holder: RegisteredModel) -> list[RegisteredVersion]:
        with self._service():
            found = _pages(self.client.search_model_versions, filter_string=f"name = '{holder.name}'")
            return sorted((_registered(one, holder.aliases) for one in found), key=lambda one: int(one.version))

    def _known_versions(self, holder: RegisteredModel) -> str:
        numbers = ", ".join(one.version for one in self._versions(holder)) or "none"
        return f"versions: {numbers}; aliases: {', '.join(sorted(holder.aliases)) or 'none'}"

    def _by_alias(self, holder: RegisteredModel, alias: str) -> RegisteredVersion | None:
        number = holder.aliases.get(alias)
        return None if number is None else self.get(holder.name, str(number))

    def _ensure_model(self, model: str) -> None:
        from mlflow.exceptions import MlflowException

        with self._service():
            try:
                self.client.create_registered_model(model)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise

    def _create_logged_model(self, run_id: str, name: str, params: Mapping[str, str], tags: Mapping[str, str]) -> LoggedModel:
        """A pending LoggedModel, as an output of the run. MLflow allows no / : . % or quote in its name."""
        from mlflow.entities import LoggedModelOutput

        experiment = self.client.get_run(run_id).info.experiment_id
        plain = re.sub(r"[/:.%\"']+", "-", name)
        model = self.client.create_logged_model(experiment, plain, run_id, dict(tags), dict(params), "featherweight")
        self.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
        return model

    def _log_files(self, winner: WinnerRecord, engine: str) -> LoggedModel:
        """The LoggedModel that holds the winner's files."""
        tags = {f"{TAG}variant": winner.variant, f"{TAG}digest": winner.digest}
        if winner.model_id is None:
            logged = self._create_logged_model(winner.run_id, winner.variant, {}, tags)
        else:
            logged = self.client.get_logged_model(winner.model_id)
            self.client.set_logged_model_tags(logged.model_id, tags)
        try:
            self._store(winner, engine, logged)
            self.client.finalize_logged_model(logged.model_id, "READY")
        except BaseException:
            self._discard(winner, logged)
            raise
        return logged

    def _store(self, winner: WinnerRecord, engine: str, logged: LoggedModel) -> None:
        """Put the model's files into the LoggedModel's place, what makes it loadable last."""
        size = sum(path.stat().st_size for path in winner.served.rglob("*") if path.is_file())
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            write_model_folder(
                folder,
                engine=engine,
                digest=winner.digest,
                size_bytes=size,
                config={"threads": winner.threads, "max_tokens": winner.max_tokens},
                lineage=winner.lineage,
                model_id=logged.model_id,
                run_id=winner.run_id,
            )
            place = local_path(logged.artifact_location)
            if place is None:
                store = self._artifacts(logged.artifact_location)
                store.log_artifacts(str(winner.served), SERVED)
                store.log_artifacts(str(folder))
                return
            link_tree(winner.served, place / SERVED)
            shutil.copytree(folder, place, dirs_exist_ok=True)

    def _create_version(self, winner: WinnerRecord, engine: str, logged: LoggedModel) -> RegisteredVersion:
        """The registered version, all tags in the one call that creates it."""
        with self._exclusive(winner.model):
            known = self.find(winner.model, winner.digest)
            if known is not None:
                self._discard(winner, logged)
                return known
            made = self.client.create_model_version(
                winner.model,
                logged.artifact_location,
                winner.run_id,
                _version_tags(winner, engine, logged.model_id),
                description=f"{winner.variant} on {engine}",
                model_id=logged.model_id,
            )
        return replace(_registered(made, {}), new=True)

    def _discard(self, winner: WinnerRecord, logged: LoggedModel) -> None:
        """Take back what a failed registration wrote; a LoggedModel that was there before keeps its metrics."""
        place = local_path(logged.artifact_location)
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)
        if winner.model_id is None:
            self.client.delete_logged_model(logged.model_id)

    def _append(
        self,
        holder: RegisteredModel,
        moved: RegisteredVersion,
        to: str,
        who: str,
        why: str,
        action: Action,
        gates: Sequence[GateResult] = (),
    ) -> None:
        past = self.history(holder.name)
        entry = Transition("", who, why, action, moved.version, moved.digest, moved.stage, to, tuple(gates))
        key, value = history.follow(entry, past).as_tag()
        with self._service():
            self.client.set_registered_model_tag(holder.name, key, value)

    def _displace(self, holder: RegisteredModel, moved: RegisteredVersion, to: str, who: str) -> None:
        """Make room: whoever holds the place that `moved` takes goes to the stage below."""
        taken = {"production": (CHAMPION, "archived"), "staging": (CHALLENGER, "none")}.get(to)
        out = self._by_alias(holder, taken[0]) if taken else None
        if taken is None or out is None:
            return
        self._append(holder, out, taken[1], who, f"displaced by version {moved.version}", "displaced")
        self._label(out, taken[1])
        if to == "production":
            with self._service():
                self.client.set_registered_model_alias(holder.name, PREVIOUS, out.version)

    def _place(self, moved: RegisteredVersion, to: str) -> None:
        """Point the aliases: the new one before the old ones go, so that there is a champion at every moment."""
        alias = {"production": CHAMPION, "staging": CHALLENGER}.get(to)
        with self._service():
            if alias:
                self.client.set_registered_model_alias(moved.model, alias, moved.version)
            holder = self._model(moved.model)
            stale = {CHAMPION, CHALLENGER, PREVIOUS} if to == "production" else {CHAMPION, CHALLENGER}
            for name in stale - {alias}:
                if str(holder.aliases.get(name)) == moved.version:
                    self.client.delete_registered_model_alias(moved.model, name)
        self._label(moved, to)

    def _point_previous_below(self, model: str, version: str) -> None:
        """Let `previous` name the champion before `version`, as the history tells it."""
        there = {one.version for one in self.versions(model)}
        line = [one for one in history.champions(self.history(model)) if one in there and one != version]
        with self._service():
            if line:
                self.client.set_registered_model_alias(model, PREVIOUS, line[-1])
            elif PREVIOUS in self._model(model).aliases:
                self.client.delete_registered_model_alias(model, PREVIOUS)

    def _label(self, moved: RegisteredVersion, stage: str) -> None:
        """Say the stage in a tag, and in MLflow's own stage where the server still has stages."""
        from mlflow.exceptions import MlflowException

        with self._service(), warnings.catch_warnings():
            self.client.set_model_version_tag(moved.model, moved.version, f"{TAG}stage", stage)
            warnings.simplefilter("ignore", FutureWarning)
            try:
                self.client.transition_model_version_stage(moved.model, moved.version, stage.capitalize())
            except MlflowException as error:
                if error.error_code not in ("FEATURE_DISABLED", "ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED"):
                    raise

    @contextmanager
    def _exclusive(self, model: str, patience_s: float = 30.0) -> Iterator[None]:
        """Hold the model's lock, so that reading the champion and moving the aliases is one step among all writers.

        MLflow has no compare-and-set. A writer hangs up a tag of its own, then looks: it holds the lock if it sees no other.
        Of two writers at least the later one sees the other's tag, so never both hold it; on a clash both take theirs down
        and try again after a random pause. A tag left by a killed writer counts for LEASE_S only.
        """
        mine, end = f"{LOCK}{uuid.uuid4().hex}", time.monotonic() + patience_s
        while not self._hang(model, mine):
            if time.monotonic() > end:
                raise ServiceError(f"another promotion of '{model}' is under way since {patience_s:.0f} s; try again")
            time.sleep(random.uniform(0.02, 0.3))
        try:
            yield
        finally:
            with self._service():
                self.client.delete_registered_model_tag(model, mine)

    def _hang(self, model: str, mine: str) -> bool:
        """Hang up this writer's lock; take it down again and say False where another one hangs."""
        self._model(model)
        with self._service():
            self.client.set_registered_model_tag(model, mine, str(time.time() + LEASE_S))
            others = {k: v for k, v in self._model(model).tags.items() if k.startswith(LOCK) and k != mine}
            for key in [key for key, until in others.items() if float(until) < time.time()]:
                self.client.delete_registered_model_tag(model, key)
                del others[key]
            if others:
                self.client.delete_registered_model_tag(model, mine)
            return not others

    def _artifacts(self, uri: str) -> Any:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        return get_artifact_repository(uri, tracking_uri=self.tracking_uri, registry_uri=self.tracking_uri)

    @contextmanager
    def _service(self) -> Iterator[None]:
        """Turn what MLflow, its HTTP client and its database raise into one ServiceError line."""
        from mlflow.exceptions import MlflowException
        from requests import RequestException
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except FeatherweightError:
            raise
        except (MlflowException, RequestException, SQLAlchemyError, OSError) as error:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ServiceError(f"MLflow at {_shown(self.tracking_uri)} failed: {reason}") from error


def _ping(url: str) -> None:
    """Raise ServiceError where the server does not answer its health check in five seconds."""
    import httpx

    try:
        status = httpx.get(f"{url.rstrip('/')}/health", timeout=5, follow_redirects=True).status_code
    except httpx.HTTPError as error:
        reason = str(error) or type(error).__name__
        raise ServiceError(f"the MLflow server at {_shown(url)} does not answer ({reason}); is it running?") from error
    if status >= 500:
        raise ServiceError(f"the MLflow server at {_shown(url)} answers {status}; look into its log")


def _shown(uri: str) -> str:
    """The URI without its password."""
    return re.sub(r"//([^:/@]+):[^@]+@", r"//\1:***@", uri)


def _pages(search: Any, **query: Any) -> Iterator[Any]:
    """All results of a paged MLflow search."""
    token = None
    while True:
        page = search(page_token=token, **query)
        yield from page
        token = page.token
        if not token:
            return


def _registered(found: ModelVersion, aliases: Mapping[str, str]) -> RegisteredVersion:
    """A version with the stage that its aliases give it, or else its tag."""
    mine = tuple(sorted(alias for alias, number in aliases.items() if str(number) == str(found.version)))
    tagged = found.tags.get(f"{TAG}stage", "none")
    held = "production" if CHAMPION in mine else "staging" if CHALLENGER in mine else None
    stage = held or (tagged if tagged in ("none", "archived") else "none")
    created_s = found.creation_timestamp / 1000
    run_id, source = found.run_id or "", found.source or ""
    return RegisteredVersion(found.name, str(found.version), stage, mine, run_id, source, dict(found.tags), created_s)


def _version_tags(winner: WinnerRecord, engine: str, model_id: str) -> dict[str, str]:
    values = {
        "digest": winner.digest,
        "variant": winner.variant,
        "engine": engine,
        "recipe": winner.recipe,
        "run_id": winner.run_id,
        "model_id": model_id,
        "checkpoint": winner.checkpoint,
        "evaluation": winner.evaluation,
        "machine": winner.machine,
        "objective": winner.objective,
        "constraints": json.dumps(dict(winner.constraints)),
        "metrics": json.dumps(dict(winner.metrics)),
        "lineage": hashlib.sha256(winner.lineage.encode()).hexdigest(),
        "stage": "none",
    }
    return {f"{TAG}{name}": value for name, value in values.items()}


def _check_name(model: str) -> None:
    if not re.fullmatch(r"\w[\w .-]*", model):
        raise GateError(f"'{model}' cannot name a registered model; use letters, digits, spaces, '-', '_' and '.'")


def _check_words(to: str, who: str, why: str) -> None:
    if to not in get_args(StageName):
        raise GateError(f"no stage '{to}'; stages: {', '.join(get_args(StageName))}")
    if not who.strip() or not why.strip():
        raise GateError("a transition needs who does it and why")
    if len(why) > history.WHY_LIMIT or len(who) > history.WHY_LIMIT:
        raise GateError(f"who and why hold at most {history.WHY_LIMIT} characters each")
