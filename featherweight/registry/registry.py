"""The registry: winners as registered model versions, their promotion, and the history of it, all held by MLflow."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from featherweight.errors import GateError, IntegrityError, ServiceError, one_line
from featherweight.measure.batching import UNMEASURED, Batching
from featherweight.registry.answering import served_task
from featherweight.registry.attestation import ATTESTATION, sign_folder, statement
from featherweight.registry.commit import Decide, commit, complete
from featherweight.registry.decisions import refusal_decision, rollback_decision, transition_decision
from featherweight.registry.history import WHY_LIMIT, Entry, GateResult, History, StageName, Transition
from featherweight.registry.keys import Keys
from featherweight.registry.mlflow_store import MlflowStore, create_model, read_all, refuse_renamed, served_models, set_once
from featherweight.registry.model_folder import LINEAGE, SERVED, link_tree, opened, write_model_folder
from featherweight.registry.packed_text import packed
from featherweight.registry.versions import CHAMPION, NAME, TAG, RegisteredModel, RegisteredVersion
from featherweight.registry.witness import lost, witness, witnessed_fault
from featherweight.spec import registrable
from featherweight.store.mlflow_errors import MISSING, mlflow_explained
from featherweight.store.served_folder import FILE as SERVING
from featherweight.store.served_folder import Serving
from featherweight.store.tracking import open_artifacts, open_client
from featherweight.store.workspace import local_path
from featherweight.system.servers import check_url

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, LoggedModel, Run
    from mlflow.entities.model_registry import RegisteredModel as MlflowModel

PING_S = 5.0
TEXT_BYTES = 2**26  # a lineage is some kilobytes
DIGEST = 36  # characters of a data set's digest that MLflow keeps
VERSIONS_OF = "mlflow.modelVersions"
T = TypeVar("T")

__all__ = ["GateResult", "Measured", "RegisteredVersion", "Registry", "Transition", "WinnerRecord"]


@dataclass(frozen=True)
class WinnerRecord:
    """What an optimization hands to the registry: a served folder, its digest, and everything known of it.

    served: the artifact's folder, `serving.json` at its root. run_id: the optimization's parent run.
    metrics: the variant's measurement. lineage: JSON of a featherweight.lineage.LineageGraph.
    checkpoint, evaluation: digests of the checkpoint it was made from and of the text it was measured on.
    constraints, objective: the recipe's, so that promotion can judge by the registry alone.
    threads, batching, max_tokens: how the engine is opened when the model is loaded; by default for as many tokens as were
    verified.
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
    batching: Batching = UNMEASURED
    max_tokens: int | None = None
    model_id: str | None = None

    @property
    def opened(self) -> dict[str, float]:
        """The same as MLflow keeps it beside the model."""
        return opened(self.threads, self.batching) | ({"max_tokens": self.max_tokens} if self.max_tokens else {})


@dataclass(frozen=True)
class Measured:
    """Where a variant's figures are from: the run of its evaluation, and the text that it was scored on, by name and digest."""

    run_id: str
    text: str
    digest: str
    source: str


class Registry:
    """MLflow's tracking and registry API at one URI. Every method raises ServiceError where MLflow cannot be reached."""

    def __init__(self, tracking_uri: str) -> None:
        self.tracking_uri = tracking_uri

    @cached_property
    def client(self) -> MlflowClient:
        """The client, of this URI only."""
        with self._service():
            return open_client(self.tracking_uri)

    def check(self) -> None:
        """Raise ServiceError within seconds where the server is down, hangs, or refuses the credentials."""
        if self.tracking_uri.startswith(("http://", "https://")):
            _ping(self.tracking_uri)
        check_url(self.tracking_uri, "MLflow", "MLFLOW_TRACKING_URI")
        with self._service():
            self.client.search_registered_models(max_results=1)

    # -- what is there ------------------------------------------------------------------------------------------------

    def models(self) -> list[str]:
        """Names of all registered models, those that hold histories left out."""
        with self._service():
            return sorted(model.name for model in served_models(self.client))

    def get(self, model: str, version: str) -> RegisteredVersion:
        """A version by number or alias. Raises GateError where there is none."""
        return self.model(model).pick(version)

    def versions(self, model: str) -> list[RegisteredVersion]:
        """All versions of a model, oldest first."""
        return list(self.model(model).versions.values())

    def champion(self, model: str) -> RegisteredVersion | None:
        """The version in production, None where there is none, or where it was deleted in MLflow."""
        return self.model(model).holder(CHAMPION)

    def find(self, model: str, digest: str) -> RegisteredVersion | None:
        """The version that serves the artifact of that digest, None where there is none.

        Raises GateError where the model was renamed in MLflow: a second one of its old name would have no champion to beat.
        """
        seen = self.ready(model)
        return next((one for one in seen.versions.values() if one.digest == digest), None) if seen else None

    def ready(self, model: str, decides: bool = False) -> RegisteredModel | None:
        """The model as it stands, None where none is registered under that name, for whoever is about to register a winner.

        Raises GateError where it was renamed in MLflow. decides: something will be promoted too; raises IntegrityError where the
        history was cut off or altered, Forbidden where its entries are signed and this user has no key.
        """
        with self._service():
            refuse_renamed(self.client, model)
            if not self.client.search_registered_models(f"name = '{model}'"):
                return None
            store = MlflowStore(self.client, model)
            seen = store.read()
            if decides:
                _require_witnessed(seen)
                seen.require_whole()
                store.signed("")
            return seen

    def history(self, model: str) -> History:
        """What was decided for a model's versions, and what lost against it."""
        return self.model(model).history

    def model(self, model: str) -> RegisteredModel:
        """The model at one look. Raises GateError where there is none."""
        with self._service():
            return MlflowStore(self.client, model).read()

    def all_models(self) -> list[RegisteredModel]:
        """Every registered model at one look, in few questions however many there are."""
        with self._service():
            return read_all(self.client)

    def settle(self, model: str) -> RegisteredModel:
        """Let aliases, tags and stages follow the history, where somebody stopped before they did; the model as it then stands."""
        with self._service():
            store = MlflowStore(self.client, model)
            seen = store.read()
            _require_witnessed(seen)
            return complete(store, seen)

    def lineage_json(self, version: RegisteredVersion) -> str:
        """The `lineage.json` that was registered with a version."""
        return self._text(version, LINEAGE)

    def serving(self, version: RegisteredVersion) -> Serving:
        """How a version's files say that they are served. Raises IntegrityError where they do not say it."""
        return Serving.of(self._text(version, f"{SERVED}/{SERVING}"))

    def _text(self, version: RegisteredVersion, name: str) -> str:
        """One text among a version's files."""
        local = local_path(version.source)
        with self._service(), tempfile.TemporaryDirectory() as folder:
            got = local / name if local else Path(folder) / Path(name).name
            if local is None:  # what every artifact store defines; its public sister lists the folder first, which takes as long
                self._artifacts(version.source)._download_file(name, str(got))
            if not got.is_file():  # a pipe would not end
                raise IntegrityError(f"{got} is missing, or no plain file")
            if got.stat().st_size > TEXT_BYTES:
                raise IntegrityError(f"{got} was altered: it holds {got.stat().st_size / 2**20:,.0f} MiB")
            try:
                return got.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise IntegrityError(f"{got} was altered: it is no text") from error

    def download(self, uri: str, folder: Path) -> Path:
        """An artifact folder of a remote store, downloaded into `folder`. Raises ServiceError where no store answers at `uri`."""
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with self._service():
                return Path(self._artifacts(uri).download_artifacts("", str(folder)))
        except ValueError as error:  # MLflow's reading of an address that is none of a store
            raise ServiceError(f"no artifacts can be read at {uri}: {one_line(error, 200)}") from error

    def model_folder(self, version: RegisteredVersion, folder: Path) -> Path:
        """All files of a version: where they lie on a local store, else downloaded into `folder`."""
        return local_path(version.source) or self.download(version.source, folder)

    def entry_signatures(self, model: str) -> dict[int, tuple[str, str]]:
        """Text and signature of each stored history entry, by number."""
        with self._service():
            return MlflowStore(self.client, model).signatures()

    def history_model(self, model: str) -> MlflowModel | None:
        """The registered model that holds the history of one, None where there is none (any more)."""
        with self._service():
            return MlflowStore(self.client, model).kept_in()

    def location(self, version: RegisteredVersion) -> str:
        """Where MLflow itself takes a version's files from."""
        with self._service():
            return str(self.client.get_model_version_download_uri(version.model, version.version))

    def run(self, run_id: str) -> Run | None:
        """A run, None where MLflow has it no more."""
        with self._service():
            run = _unless_missing(lambda: self.client.get_run(run_id))
        return None if run is None or run.info.lifecycle_stage == "deleted" else run

    def logged_model(self, model_id: str) -> LoggedModel | None:
        """A LoggedModel, None where MLflow has it no more."""
        with self._service():
            return _unless_missing(lambda: self.client.get_logged_model(model_id))

    def quarantine(self, model: str) -> list[int]:
        """Take unreadable history entries out, their text kept in a tag of the model; returns their numbers."""
        with self._service():
            return MlflowStore(self.client, model).quarantine()

    def served_folder(self, version: RegisteredVersion, folder: Path) -> Path:
        """The served files of a version: where they lie on a local store, else downloaded into `folder`."""
        local = local_path(version.source)
        if local is not None:
            return local / SERVED
        folder.mkdir(parents=True, exist_ok=True)
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
        measured: Measured | None = None,
    ) -> str:
        """Log a variant as a LoggedModel of the run, with its metrics; returns its id. Holds no files until it wins.

        measured: lets MLflow's pages lead from the model to the run that measured it, and to the text, and back.
        """
        from mlflow.entities import LoggedModelInput, Metric

        with self._service():
            model = self._create_logged_model(run_id, name, params or {}, {**(tags or {}), f"{TAG}variant": name})
            now = int(time.time() * 1000)
            text: dict[str, str] = {"dataset_name": measured.text, "dataset_digest": measured.digest[:DIGEST]} if measured else {}
            self.client.log_batch(run_id, [Metric(key, one, now, 0, model.model_id, **text) for key, one in metrics.items()])
            if measured is not None:  # its run may have been deleted since
                data, models = [_dataset(measured.text, measured.digest, measured.source)], [LoggedModelInput(model.model_id)]
                _unless_missing(lambda: self.client.log_inputs(measured.run_id, data, models))
            self.client.finalize_logged_model(model.model_id, "READY")
            return model.model_id

    def log_datasets(self, run_id: str, texts: Mapping[str, tuple[str, str]]) -> None:
        """Name the data of a run on its MLflow page: digest and source by name."""
        with self._service():
            self.client.log_inputs(run_id, [_dataset(name, *told) for name, told in texts.items()])

    def register(self, winner: WinnerRecord) -> RegisteredVersion:
        """Register a winner as a new version; the version that is there already where its digest is registered.

        The served files are hard-linked into a local artifact store, uploaded to a remote one. Nothing is left behind
        on failure. Raises ServiceError, or IntegrityError where the folder is not a served variant.
        """
        _check_name(winner.model)
        engine = Serving.read(winner.served).engine
        self.check()
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
        rule: str = "",
    ) -> RegisteredVersion:
        """Move a version to a stage by one entry in the history; nothing happens where it stands there already.

        A displaced champion is archived and becomes `previous`, a displaced challenger goes back to none.
        expect_champion: the version number that the gates compared with, '' for none: GateError, naming who came first, where
        another is champion now. None does not look. rule: what becomes of aliases moved out of band from then on, '' for as before.
        """
        _check_words(to, who, why)

        number = version if version.isdigit() else self.get(model, version).version  # an alias may name another one in a moment
        return self.decide(model, transition_decision(number, to, who, why, gates, expect_champion, rule)).pick(number)

    def rollback(self, model: str, who: str, why: str) -> RegisteredVersion:
        """Make the champion before the present one champion again; a second rollback goes one further back.

        Raises GateError where there is no champion to go back to, or where another promotion or rollback came first.
        """
        _check_words("production", who, why)
        return self.decide(model, rollback_decision(who, why)).pick(CHAMPION)

    def refuse(self, model: str, version: str, who: str, why: str) -> RegisteredVersion:
        """Record that a person refuses a version, which goes back to none. Raises GateError where it is in production."""
        _check_words("none", who, why)
        number = self.get(model, version).version
        return self.decide(model, refusal_decision(number, who, why)).pick(number)

    def repair(self, model: str, who: str) -> Entry | None:
        """Take what is left of a history that was cut for the whole of it, by an entry that says so; None where it is whole."""
        with self._service():
            seen, entry = commit(
                MlflowStore(self.client, model), lambda seen: seen.repair(who, lost(seen.born, seen.history, Keys.here()))
            )
        witness(seen, Keys.here())
        return entry

    def decide(self, model: str, decide: Decide[RegisteredModel]) -> RegisteredModel:
        """Append what `decide` says as things stand, if anything; the model once it shows that. Raises what `decide` raises."""
        with self._service():
            store = MlflowStore(self.client, model)
            _require_witnessed(store.read())
            seen, _ = commit(store, decide)
        witness(seen, Keys.here())
        return seen

    # -- how ------------------------------------------------------------------------------------------------------------

    def _ensure_model(self, model: str) -> None:
        """The registered model, with the name by which recipes know it in a tag, which stays where MLflow renames it."""
        with self._service():
            create_model(self.client, model)
            set_once(self.client.set_registered_model_tag, model, NAME, model)

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
                config=winner.opened,
                lineage=winner.lineage,
                model_id=logged.model_id,
                run_id=winner.run_id,
                task=served_task(winner.served),
            )
            place = local_path(logged.artifact_location)
            if place is None:
                link_tree(winner.served, folder / SERVED)
                sign_folder(folder, Keys.here())
                self._artifacts(logged.artifact_location).log_artifacts(str(folder))
                return
            link_tree(winner.served, place / SERVED)
            shutil.copytree(folder, place, dirs_exist_ok=True)
            sign_folder(place, Keys.here())

    def _create_version(self, winner: WinnerRecord, engine: str, logged: LoggedModel) -> RegisteredVersion:
        """The registered version, all tags in the one call that creates it; of two for one digest the lower number is the one."""
        self._ensure_model(winner.model)
        with _store_in_process(self.tracking_uri):  # which asks MLflow's global URI where the LoggedModel lies
            made = self.client.create_model_version(
                winner.model,
                f"models:/{logged.model_id}",  # by which MLflow's page of the version leads to that of the LoggedModel
                winner.run_id,
                _version_tags(winner, engine, logged),
                description=f"{winner.variant} on {engine}",
                await_creation_for=0,
                model_id=logged.model_id,
            )
        self._link(logged.model_id, winner.model, str(made.version))
        model = self.model(winner.model)
        first = next(one for one in model.versions.values() if one.digest == winner.digest)
        if signature := Keys.here().sign(statement(first, model.born)):
            set_once(self.client.set_model_version_tag, winner.model, first.version, ATTESTATION, signature)
        return replace(self.get(winner.model, first.version), new=first.version == str(made.version))

    def _link(self, model_id: str, model: str, version: str) -> None:
        """Let MLflow's page of the LoggedModel lead to the version, as a server does by itself."""
        told = json.loads(self.client.get_logged_model(model_id).tags.get(VERSIONS_OF, "[]"))
        if not any((one["name"], str(one["version"])) == (model, version) for one in told):
            links = [*told, {"name": model, "version": version}]
            self.client.set_logged_model_tags(model_id, {VERSIONS_OF: json.dumps(links)})

    def _discard(self, winner: WinnerRecord, logged: LoggedModel) -> None:
        """Take back what a failed registration wrote; a LoggedModel that was there before keeps its metrics."""
        place = local_path(logged.artifact_location)
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)
        if winner.model_id is None:
            self.client.delete_logged_model(logged.model_id)

    def _artifacts(self, uri: str) -> Any:
        return open_artifacts(uri, self.tracking_uri)

    def _service(self) -> AbstractContextManager[None]:
        return mlflow_explained(self.tracking_uri, files=True)


def _ping(url: str) -> None:
    """Raise ServiceError where the server does not answer its health check in PING_S seconds."""
    import httpx

    try:
        status = httpx.get(f"{url.rstrip('/')}/health", timeout=PING_S, follow_redirects=True).status_code
    except httpx.HTTPError as error:
        reason = str(error) or type(error).__name__
        raise ServiceError(f"the MLflow server at {url} does not answer ({reason}); is it running?") from error
    if status >= 500:
        raise ServiceError(f"the MLflow server at {url} answers {status}; look into its log")


def _require_witnessed(seen: RegisteredModel) -> None:
    """Raise IntegrityError where the history does not hold what this user saw of it."""
    if fault := witnessed_fault(seen.born, seen.history, Keys.here()):
        raise IntegrityError(f"{fault}; nothing is decided on it (`featherweight audit {seen.model} --repair`)")


def _unless_missing(ask: Callable[[], T]) -> T | None:
    """What MLflow answers, None where it has no such thing."""
    from mlflow.exceptions import MlflowException

    try:
        return ask()
    except MlflowException as error:
        if error.error_code not in MISSING:
            raise
        return None


def _store_in_process(tracking_uri: str) -> AbstractContextManager[None]:
    """MLflow's global URI, where its store is no server but in this process."""
    from mlflow.tracking._tracking_service.utils import _use_tracking_uri

    return nullcontext() if tracking_uri.startswith("http") else _use_tracking_uri(tracking_uri)


def _dataset(name: str, digest: str, source: str) -> DatasetInput:
    """A text as an input of a run."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    told = Dataset(name, digest[:DIGEST], "local", json.dumps({"uri": source, "sha256": digest}))
    return DatasetInput(told, [InputTag("mlflow.data.context", name.rpartition("/")[2])])


def _version_tags(winner: WinnerRecord, engine: str, logged: LoggedModel) -> dict[str, str]:
    values = {
        "digest": winner.digest,
        "variant": winner.variant,
        "engine": engine,
        "recipe": winner.recipe,
        "run_id": winner.run_id,
        "model_id": logged.model_id,
        "location": logged.artifact_location,
        "checkpoint": winner.checkpoint,
        "evaluation": winner.evaluation,
        "machine": winner.machine,
        "objective": winner.objective,
        "constraints": json.dumps(dict(winner.constraints)),
        "metrics": json.dumps(dict(winner.metrics)),
        "lineage": hashlib.sha256(winner.lineage.encode()).hexdigest(),
        "stage": "none",
        **packed(winner.lineage),
    }
    return {f"{TAG}{name}": value for name, value in values.items()}


def _check_name(model: str) -> None:
    try:
        registrable(model)
    except ValueError as error:
        raise GateError(str(error)) from error


def _check_words(to: str, who: str, why: str) -> None:
    if to not in get_args(StageName):
        raise GateError(f"no stage '{to}'; stages: {', '.join(get_args(StageName))}")
    if not who.strip() or not why.strip():
        raise GateError("a transition needs who does it and why")
    if len(why) > WHY_LIMIT or len(who) > WHY_LIMIT:
        raise GateError(f"who and why hold at most {WHY_LIMIT} characters each")
