"""`featherweight guard`: aliases and stages in MLflow are held to the histories, within seconds where MLflow tells of moves."""

from __future__ import annotations

from featherweight.errors import RecipeError
from featherweight.masking import masked
from featherweight.registry.guarding.deliveries import Deliveries
from featherweight.registry.guarding.guard import Guard
from featherweight.registry.guarding.receiver import PATH, Receiver
from featherweight.registry.guarding.subscription import Subscription, owners_secret
from featherweight.registry.registry import Registry
from featherweight.store.workspace import Workspace
from flows.listening import Teller, address_of, answering, listening, stoppable

EVERYWHERE = ("0.0.0.0", "::")
SECRET = ("guard", "secret")


def guard(workspace: Workspace, host: str, port: int, url: str, every_s: float, as_json: bool) -> None:
    """Guard until Ctrl-C or SIGTERM. Raises RecipeError, ServiceError where that cannot be.

    url: the address at which the MLflow server reaches us; this machine's own where it is omitted.
    """
    if host in EVERYWHERE and not url:
        raise RecipeError(f"--host {host} is no address to call: give the one that MLflow reaches this by (--url http://NAME:PORT)")
    if masked(url) != url:
        raise RecipeError(f"--url {url} holds a password, which MLflow would log; what calls this is told by its signature")
    registry, said = Registry(workspace.tracking_uri), Teller(as_json)
    with listening(host, port) as listener, stoppable():
        registry.check()
        called = (url or address_of(listener, host)).rstrip("/").removesuffix(PATH) + PATH
        secret = owners_secret(workspace.root.joinpath(*SECRET))
        is_server = workspace.tracking_uri.startswith(("http://", "https://"))
        guarding = Guard(registry, Subscription(registry.client, called, secret) if is_server else None, every_s, said.tell)
        try:
            with answering(Receiver(Deliveries(secret), guarding.hear), listener):
                guarding.turn()
                told = f"told of moves at {masked(called)}, and " if is_server else ""
                where = masked(workspace.tracking_uri)
                said.tell("ready", f"guarding {where}: {told}looking at all every {every_s:g} s", url=masked(called))
                while True:
                    guarding.turn()
        except KeyboardInterrupt:
            said.tell("stopped", "stopped")
