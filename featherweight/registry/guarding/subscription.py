"""The webhook by which an MLflow server tells of moved aliases, and the secret that both know."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.errors import ServiceError
from featherweight.registry.guarding.deliveries import EVENTS
from featherweight.registry.mlflow_store import all_pages
from featherweight.system.locks import locked_file

if TYPE_CHECKING:
    from mlflow import MlflowClient

NAME = "featherweight-guard"
CACHED_S = 60.0
"""For how long a server uses its list of webhooks, unless MLFLOW_WEBHOOK_CACHE_TTL says otherwise."""


@dataclass
class Subscription:
    """A webhook of the server behind `client` to `url`, signed with `secret`, which MLflow never tells."""

    client: MlflowClient
    url: str
    secret: str = field(repr=False)
    _told: bool = False

    def keep(self) -> bool:
        """Make the webhook, or mend it where somebody changed or removed it; it gets our secret the first time.

        Returns whether anything was changed, of which the server may know nothing for CACHED_S more. Raises MlflowException, as
        where the server sends no webhooks, or lets this user make none.
        """
        found: list[Any] = [one for one in all_pages(self.client.list_webhooks) if (one.name, one.url) == (NAME, self.url)]
        wanted: dict[str, Any] = {"events": list(EVENTS), "secret": self.secret, "status": "ACTIVE"}
        changed = not (self._told and found and self._whole(found[0]))
        if not found:
            self.client.create_webhook(NAME, self.url, **wanted)
        elif changed:
            self.client.update_webhook(found[0].webhook_id, **wanted)
        self._told = True
        for other in found[1:]:
            self.client.delete_webhook(other.webhook_id)
        return changed

    def _whole(self, found: Any) -> bool:
        return found.status == "ACTIVE" and {str(event) for event in found.events} == set(EVENTS)


def owners_secret(path: Path) -> str:
    """The secret in a file that its owner alone may read, made at the first call. Raises ServiceError where others may."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with locked_file(path.with_name(f"{path.name}.lock")):
        if not path.exists():
            part = path.with_name(f"{path.name}.part")
            part.unlink(missing_ok=True)
            part.touch(mode=0o600)
            part.write_text(secrets.token_hex(32))
            part.replace(path)
    if path.stat().st_mode & 0o077:
        raise ServiceError(f"others may read {path}, which holds a secret: chmod 600 it, or remove it and start again")
    return path.read_text().strip()
