"""What libraries import and nothing here asks for, left out: half of the CPU seconds of a process that opens a checkpoint."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from featherweight.system import transformers_import

ABSENT = {
    "transformers.generation.candidate_generator": ("transformers.utils", "is_sklearn_available"),
    "accelerate.commands.config.sagemaker": ("accelerate.utils.imports", "is_boto3_available"),
}
"""Modules that find a library missing, and whom they ask for it.

transformers imports scikit-learn, and pandas with it, wherever a model can generate, for the curve by which assisted generation
tunes the confidence of its draft; without it that confidence stays as it was set. accelerate's boto3 is for SageMaker.
"""
EXPECTATIONS = "great_expectations.expectations"
LATER = {
    "transformers.quantizers.quantizer_torchao": [
        ("torchao.prototype.safetensors.safetensors_support", "flatten_tensor_state_dict")
    ],
    "transformers.loss.loss_utils": [("scipy.optimize", "linear_sum_assignment")],
    f"{EXPECTATIONS}.core.expect_column_kl_divergence_to_be_less_than": [("altair", "Chart"), ("scipy.stats", "entropy")],
    f"{EXPECTATIONS}.metrics.column_aggregate_metrics.column_parameterized_distribution_ks_test_p_value": [
        ("scipy.stats", "kstest")
    ],
    f"{EXPECTATIONS}.metrics.column_aggregate_metrics.column_bootstrapped_ks_test_p_value": [("scipy.stats", "kstest")],
}
"""Modules that import one function, and theirs do, from each of some libraries, which are loaded when it is first called."""
LARGE = {"torch", "transformers", "transformers.modeling_utils", "mlflow", "prefect", "great_expectations", "llmcompressor"}
"""Imports of up to a million objects, none of them garbage."""
Around = Callable[[ModuleType], AbstractContextManager[None]]


class LighterImports(MetaPathFinder):
    """Finds the modules of the tables above where they are, and changes what they meet while they are imported."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The usual specification, the execution of the module surrounded; nothing for any other module."""
        if fullname in ABSENT:
            asked, name = ABSENT[fullname]
            setattr(sys.modules[asked], name, lambda: False)
        around = _around(fullname)
        spec = PathFinder.find_spec(fullname, path, target) if around else None
        if around and spec and spec.loader:
            spec.loader.exec_module = _executing(spec.loader.exec_module, around)  # type: ignore[assignment]
        return spec


def install() -> None:
    """Make every import that follows in this process lighter."""
    if not any(isinstance(finder, LighterImports) for finder in sys.meta_path):
        sys.meta_path.insert(0, LighterImports())


def _around(fullname: str) -> Around | None:
    if fullname in LATER:
        return lambda module: all_standing_in(LATER[fullname])
    if fullname in LARGE:
        return lambda module: nothing_collected()
    return transformers_import.shortened if fullname == transformers_import.MODULE else None


def _executing(execute: Callable[[ModuleType], None], around: Around) -> Callable[[ModuleType], None]:
    def exec_module(module: ModuleType) -> None:
        with around(module):
            execute(module)

    return exec_module


@contextmanager
def nothing_collected() -> Iterator[None]:
    """The collector of cyclic garbage at rest; inside of another it changes nothing."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def all_standing_in(names: Iterable[tuple[str, str]]) -> Iterator[None]:
    """The same of several modules."""
    with ExitStack() as stack:
        for name, function in names:
            stack.enter_context(standing_in(name, function))
        yield


@contextmanager
def standing_in(name: str, function: str) -> Iterator[None]:
    """A module that is not loaded yet is found all the same: one of that function."""
    stand_in = StandIn(name, function)
    sys.modules.setdefault(name, stand_in)
    try:
        yield
    finally:
        stand_in.leave()


class StandIn(ModuleType):
    """A module of one function, which loads the real module when it is called."""

    def __init__(self, name: str, function: str) -> None:
        super().__init__(name)

        def call(*given: Any, **named: Any) -> Any:
            return getattr(self._real(), function)(*given, **named)

        setattr(self, function, call)

    def __getattr__(self, name: str) -> Any:
        """What another thread asks of it meanwhile, from the real module."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._real(), name)

    def _real(self) -> ModuleType:
        self.leave()
        return importlib.import_module(self.__name__)

    def leave(self) -> None:
        """Be found no more."""
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
