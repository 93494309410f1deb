"""The MLflow model of a served variant: a pyfunc from code, around the variant's own files."""

from __future__ import annotations

import shutil
import warnings
from importlib.metadata import version
from pathlib import Path

from featherweight.checkpoint.files import link
from featherweight.measure.batching import Batching
from featherweight.registry.answering import signature
from featherweight.runtimes.catalog import RUNTIMES
from featherweight.spec import HEADED, Task

CODE = Path(__file__).with_name("pyfunc_model.py")
SERVED = "artifacts/served"
LINEAGE = "lineage.json"
EXAMPLE = ["Once upon a time"]

_COMMON = ("mlflow", "pandas", "transformers", "featherweight")


def requirements(engine: str, task: Task = "text-generation") -> list[str]:
    """The distributions that serve a variant of `engine`, at the versions installed here, without a '+cpu' of a local build."""
    behind = ("torch",) if task in HEADED and "torch" not in RUNTIMES[engine].requirements else ()
    return [f"{name}=={version(name).partition('+')[0]}" for name in (*_COMMON, *RUNTIMES[engine].requirements, *behind)]


def opened(threads: int, batching: Batching) -> dict[str, float]:
    """How an engine is opened, as MLflow keeps it beside a model: what stands there may be given otherwise at loading, and nothing
    else may.
    """
    return {"threads": threads, "max_batch": batching.max_batch, "batch_window_s": batching.window_s}


def write_model_folder(
    folder: Path,
    *,
    engine: str,
    digest: str,
    size_bytes: int,
    config: dict[str, float],
    lineage: str,
    model_id: str,
    run_id: str,
    task: Task = "text-generation",
) -> None:
    """Write everything of the MLflow model but the served files, which the caller puts at `folder/artifacts/served`.

    MLflow's own `artifacts=` would copy the weights twice on the way (to a staging folder, then to the store).
    """
    from mlflow.models import Model
    from mlflow.models.utils import _save_example
    from mlflow.pyfunc import save_model

    with warnings.catch_warnings(record=True):  # of type hints that are no schema: the signature is set below
        save_model(
            path=str(folder),
            python_model=str(CODE),
            mlflow_model=Model(model_uuid=model_id, model_id=model_id, run_id=run_id),
            pip_requirements=requirements(engine, task),
            model_config=config,
            metadata={"featherweight.digest": digest, "featherweight.engine": engine},
        )
    model = Model.load(str(folder))
    model.signature = signature(task)
    model.model_size_bytes = size_bytes
    served = {"path": SERVED, "uri": f"sha256:{digest}"}
    model.flavors["python_function"] |= {"artifacts": {"served": served}, "model_code_path": CODE.name}
    _save_example(model, EXAMPLE, str(folder))
    model.save(str(folder / "MLmodel"))
    (folder / LINEAGE).write_text(lineage, encoding="utf-8")
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    (folder / "__pycache__").touch()  # no byte code can be put beside the code, by Python at loading or by anybody to be run


def link_tree(source: Path, target: Path) -> None:
    """`source` again at `target`, by hard links where the file system can, so that weights lie on disk once."""
    shutil.copytree(source, target, copy_function=lambda a, b: link(Path(a), Path(b)), dirs_exist_ok=True)
