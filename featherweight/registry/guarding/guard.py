"""Looks at registered models: at once at those that were heard of, and every so often at all of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from queue import Empty, SimpleQueue

from featherweight.errors import FeatherweightError, one_line, told
from featherweight.registry.guarding.subscription import CACHED_S, Subscription
from featherweight.registry.out_of_band import look
from featherweight.registry.registry import Registry

CLOSE_S = 5.0
"""Between looks while the server may not know of its webhook yet."""
Tell = Callable[[str, str], None]
"""Is told what happens, 'moved' or 'note', and the same in words."""


class Guard:
    """Undoes, keeps or tells what was moved in MLflow, as each model's last promotion says.

    every_s: between looks at all models, which find what no webhook told: MLflow's own stages, or a delivery that was lost.
    """

    def __init__(self, registry: Registry, subscription: Subscription | None, every_s: float, tell: Tell) -> None:
        self._registry, self._subscription, self._every_s, self._tell = registry, subscription, every_s, tell
        self._heard: SimpleQueue[str] = SimpleQueue()
        self._next = self._unheard_until = time.monotonic()
        self._said: dict[str, str] = {}

    def hear(self, model: str) -> None:
        """A model that somebody moved something of; from any thread."""
        self._heard.put(model)

    def turn(self) -> None:
        """Wait until there is something to look at, and look at it."""
        for model in self._waited():
            self._look(model)
        if time.monotonic() >= self._next:
            self.look_at_all()
            now = time.monotonic()
            self._next = now + (min(self._every_s, CLOSE_S) if now < self._unheard_until else self._every_s)

    def look_at_all(self) -> None:
        """Look at every model that shows anything else than its history says, and see to it that MLflow goes on telling."""
        self._keep_subscription()
        try:
            for one in self._registry.all_models():
                if one.behind() or one.out_of_band():
                    self._look(one.model)
            self._note("models", "")
        except FeatherweightError as error:
            self._note("models", f"no look at the registered models: {told(error)}")

    def _waited(self) -> list[str]:
        """The models that were heard of, each once; none where it is time to look at all."""
        try:
            found = [self._heard.get(timeout=max(0.0, self._next - time.monotonic()))]
            while not self._heard.empty():
                found.append(self._heard.get())
        except Empty:
            return []
        return list(dict.fromkeys(found))

    def _look(self, model: str) -> None:
        """One look; whatever fails costs that look alone."""
        try:
            moved = look(self._registry, model)[1]
        except Exception as error:  # an engine that is asked whether it answers raises what it likes
            self._note(model, f"no look at {model}: {told(error)}")
            return
        self._note(model, "")
        if moved:
            self._tell("moved", f"{model}: {moved.to_text()}")

    def _keep_subscription(self) -> None:
        from mlflow.exceptions import MlflowException

        if self._subscription is None:
            return
        try:
            if self._subscription.keep():
                self._unheard_until = time.monotonic() + CACHED_S
            self._note("webhook", "")
        except MlflowException as error:
            way = f"moves are seen every {self._every_s:g} s only"
            self._note("webhook", f"MLflow sends no webhooks to {self._subscription.url} ({one_line(error, 200)}): {way}")

    def _note(self, about: str, text: str) -> None:
        """Tell something once, not at every look."""
        if text and self._said.get(about) != text:
            self._tell("note", text)
        self._said[about] = text
