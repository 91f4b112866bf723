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


def read_instructions() -> list[tuple[str, str]]:
    """(name, rest) of every instruction of the Dockerfile."""
    text = (ROOT / "cluster/Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0].upper(), line.split(maxsplit=1)[1]) for line in lines]


def test_the_image_is_of_a_fixed_base_runs_as_a_user_and_keeps_no_package_lists_and_no_secrets() -> None:
    instructions = read_instructions()
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
    assert instructions[copied[0]][1].startswith("requirements "), "locks first, so that code alone builds in seconds"
    lock = next(rest for name, rest in instructions if name == "ARG" and rest.startswith("LOCK="))
    assert (ROOT / lock.removeprefix("LOCK=")).exists()
    (python,) = re.findall(r"python:(\d+\.\d+)", base)
    assert python == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(
        ">="
    )
