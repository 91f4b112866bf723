"""What lies under `cluster/` fits the release it is for, this package and its locks."""

from __future__ import annotations

import copy
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kuberay_schema import KEPT, RELEASE, find_faults, load_manifests

ROOT = Path(__file__).resolve().parents[2]
KUBERAY = json.loads(KEPT.read_text(encoding="utf-8"))
MANIFESTS = {path.name: manifest for path, manifest in load_manifests()}
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def list_faults(manifest: dict[str, Any]) -> list[str]:
    return list(find_faults(KUBERAY[manifest["kind"]], manifest))


def get_cluster(manifest: dict[str, Any]) -> dict[str, Any]:
    spec = manifest["spec"]
    return spec.get("rayClusterSpec", spec)


@pytest.mark.parametrize("name", MANIFESTS)
def test_kuberay_takes_the_file(name: str) -> None:
    assert KUBERAY["release"] == RELEASE
    assert list_faults(MANIFESTS[name]) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda cluster: cluster["authOptions"].update(mode="basic"), "'basic' is none of ['disabled', 'token']"),
        (lambda cluster: cluster["authOptions"].update(secret="x"), ".authOptions.secret: is no field"),
        (lambda cluster: cluster["headGroupSpec"]["rayStartParams"].update({"num-gpus": 0}), "0 is no string"),
        (lambda cluster: cluster["workerGroupSpecs"][0].update(maxReplicas="8"), "'8' is no integer"),
        (lambda cluster: cluster["workerGroupSpecs"][0].pop("template"), ".template: is required"),
        (
            lambda cluster: cluster["headGroupSpec"]["template"]["spec"]["containers"][0].update(volumeMount=[]),
            ".containers.0.volumeMount: is no field",
        ),
    ],
)
def test_a_field_that_kuberay_does_not_know_is_found(change: Callable[[dict[str, Any]], Any], said: str) -> None:
    for manifest in MANIFESTS.values():
        changed = copy.deepcopy(manifest)
        change(get_cluster(changed))
        (fault,) = list_faults(changed)
        assert said in fault


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_head_has_no_gpu_and_is_reached_by_token_and_every_node_has_the_storage_and_this_version(name: str) -> None:
    cluster = get_cluster(MANIFESTS[name])
    assert cluster["authOptions"]["mode"] == "token"
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "requirements/gpu.txt").read_text(), re.MULTILINE)
    assert pinned is not None and cluster["rayVersion"] == pinned.group(1)
    head = cluster["headGroupSpec"]
    assert head["rayStartParams"]["num-gpus"] == "0"
    for group in (head, *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["image"] == f"layerplan:{VERSION}-gpu"
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/runs"}
        assert [volume["persistentVolumeClaim"]["claimName"] for volume in pod["volumes"]] == ["layerplan-runs"]
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def read_instructions(path: str) -> list[tuple[str, str]]:
    """(name, rest) of every instruction of a Dockerfile."""
    text = (ROOT / path).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0].upper(), line.split(maxsplit=1)[1]) for line in lines]


@pytest.mark.parametrize("path", ["cluster/Dockerfile", "cluster/mlflow/Dockerfile"])
def test_an_image_is_of_a_fixed_base_runs_as_a_user_and_keeps_no_package_lists_and_no_secrets(path: str) -> None:
    instructions = read_instructions(path)
    base = next(rest for name, rest in instructions if name == "FROM")
    assert re.fullmatch(r"[a-z/]+:\d[\w.-]*", base), f"{base}: a version is wanted, not the newest"
    users = [rest for name, rest in instructions if name == "USER"]
    assert users and users[-1] not in ("root", "0")
    assert "ADD" not in {name for name, _ in instructions}, "COPY says what it does"
    for name, rest in instructions:
        if name == "RUN" and "apt-get install" in rest:
            assert {"--yes", "--no-install-recommends"} <= set(rest.split())
            assert "rm -rf /var/lib/apt/lists/*" in rest and "apt-get update" in rest
        if name == "RUN" and "pip install" in rest:
            assert "--no-cache-dir" in rest and "sudo" not in rest
        if name in ("ENV", "ARG"):
            assert not re.search(r"TOKEN=|PASSWORD|SECRET|KEY=", rest)
    copied = [index for index, (name, rest) in enumerate(instructions) if name == "COPY"]
    assert instructions[copied[0]][1].startswith("requirements"), "locks first, so that code alone builds in seconds"
    for lock in (rest for name, rest in instructions if name == "ARG" and rest.startswith("LOCK=")):
        assert (ROOT / lock.removeprefix("LOCK=")).exists()
    (python,) = re.findall(r"python:(\d+\.\d+)", base)
    assert python == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(
        ">="
    )


def test_the_server_of_a_team_has_the_versions_of_our_lock_and_four_packages_of_its_own() -> None:
    kept = set((ROOT / "requirements/cpu.txt").read_text().lower().split())
    lines = (ROOT / "cluster/mlflow/requirements.txt").read_text().split()
    assert lines == sorted(lines)
    own = {line.partition("==")[0] for line in lines if line not in kept}
    assert own == {"psycopg", "psycopg-binary", "flask-wtf", "wtforms"}


def test_every_image_and_address_of_the_team_file_is_fixed_and_only_loopback_is_published() -> None:
    compose = yaml.safe_load((ROOT / "cluster/mlflow/compose.yaml").read_text(encoding="utf-8"))
    for name, service in compose["services"].items():
        assert re.search(r":[\w.-]*\d", service["image"]) and "latest" not in service["image"], name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        for key, value in service.get("environment", {}).items():
            assert ("PASSWORD" not in key and "SECRET" not in key) or "${" in value, f"{name}: {key} is written out"
    assert compose["services"]["mlflow"]["image"] == f"layerplan-mlflow:{VERSION}"
