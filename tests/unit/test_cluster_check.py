"""What a cluster's check says of facts: each fault as it would be met, with what to do about it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from importlib.metadata import distribution
from itertools import combinations
from pathlib import Path

import pytest

from layerplan.cli import main
from layerplan.cluster_check.check import list_rounds
from layerplan.cluster_check.facts import NodeFacts, hash_installation, hash_source, parse_devices, read_facts
from layerplan.cluster_check.findings import (
    GIB,
    Finding,
    StorageTrial,
    judge_bandwidth,
    judge_clocks,
    judge_nodes,
    judge_ports,
    judge_space,
    judge_storage,
    judge_versions,
    render_table,
)
from layerplan.cluster_check.probe import find_unseen, write_file

NODE = NodeFacts(
    "10.0.0.1",
    "one",
    8,
    64 * GIB,
    60 * GIB,
    (),
    {"/tmp": 100 * GIB, "/dev/shm": 8 * GIB},
    {"torch": "2.13"},
    {"torch": "a"},
)
OTHER = replace(NODE, label="10.0.0.2", host="two")


def test_two_equal_nodes_pass() -> None:
    found = [*judge_nodes([NODE, OTHER], {}, 2), *judge_versions([NODE, OTHER]), *judge_space([NODE, OTHER])]
    assert all(each.is_ok for each in found)
    assert found[0] == Finding("nodes", "2 answered")
    assert "one, 8 CPUs, 60.0 of 64.0 GiB free, no GPU" in [each.found for each in found]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (judge_nodes([NODE], {}, 2)[0], "2 are wanted: start `ray start --address`"),
        (judge_nodes([NODE], {"10.0.0.9": "Ray calls it dead"}, 1)[1], "raylet's log"),
        (judge_nodes([replace(NODE, available=GIB)], {}, 1)[1], "less than 4 GiB"),
        (judge_nodes([NODE, replace(OTHER, devices=(("H200", 141 * GIB),))], {}, 2)[-1], "the slowest sets the pace"),
        (judge_versions([NODE, replace(OTHER, versions={"torch": "2.12"})])[0], "install the same lock file"),
        (judge_versions([NODE, replace(OTHER, hashes={"torch": "b"})])[0], "changed in place or is of another build"),
        (judge_clocks({"10.0.0.1": 0.001, "10.0.0.2": -30.0}, 0.01), "NTP service set the clock of 10.0.0.2"),
        (judge_space([NODE, replace(OTHER, free={"/tmp": GIB})])[0], "make room on 10.0.0.2"),
        (judge_space([replace(NODE, free={"/dev/shm": GIB // 2})])[0], "--shm-size"),
        (judge_storage(StorageTrial("/runs", "PermissionError: no"), 2), "name a folder or bucket"),
        (judge_storage(StorageTrial("/runs", blind=("10.0.0.2",)), 2), "mount one shared file system"),
        (judge_storage(StorageTrial("/runs", unwritable=(("10.0.0.2", "OSError: full"),)), 2), "right to write there"),
        (judge_storage(StorageTrial("/runs", free=GIB), 2), "less than 10 GiB is left for checkpoints"),
        (judge_ports({("10.0.0.1", "10.0.0.2"): "Connection refused"}, 2), "firewall of 10.0.0.2"),
        (judge_bandwidth({}, {("a", "b"): "timed out"}, None)[0], "GLOO_SOCKET_IFNAME"),
        (judge_bandwidth({("a", "b"): 5e9, ("a", "c"): 1e9, ("b", "c"): 5e9}, {}, 1e9)[1], "look at the link"),
        (judge_bandwidth({("a", "b"): 0.05e9}, {}, 0.05e9)[0], "look at the link"),
    ],
)  # fmt: skip
def test_every_fault_comes_with_its_remedy(found: Finding, said: str) -> None:
    assert not found.is_ok
    assert said in found.advice


def test_a_clock_that_is_off_by_less_than_can_be_known_passes() -> None:
    assert judge_clocks({"a": 2.5}, 1.0).is_ok
    assert judge_clocks({}, 0.0).is_ok


def test_differing_versions_name_the_package_and_its_values() -> None:
    found = judge_versions([NODE, replace(OTHER, versions={"torch": "2.12", "ray": "2.60"})])
    assert found[0].found == "ray, torch differ (ray: 2.60, missing)"


def test_the_table_lists_everything_and_then_what_to_do() -> None:
    text = render_table([Finding("nodes", "2 answered"), Finding("ports", "1 of 2 ways are closed", "open them")])
    assert text.splitlines() == [
        "ok    nodes  2 answered", "FAIL  ports  1 of 2 ways are closed", "", "What to do", "ports: open them",
    ]  # fmt: skip


@pytest.mark.parametrize("count", [2, 3, 4, 7, 8])
def test_rounds_hold_every_pair_once_and_nobody_twice(count: int) -> None:
    names = [str(index) for index in range(count)]
    rounds = list(list_rounds(names))
    assert sorted(tuple(sorted(pair)) for pairs in rounds for pair in pairs) == sorted(combinations(names, 2))
    assert all(len({name for pair in pairs for name in pair}) == 2 * len(pairs) for pairs in rounds)


def test_a_folder_that_only_its_writer_sees_is_not_shared(tmp_path: Path) -> None:
    assert write_file(tmp_path / "a", "from-0") == ""
    assert find_unseen(tmp_path / "a", ["from-0"], 0) == []
    assert find_unseen(tmp_path / "b", ["from-0"], 0) == ["from-0"]
    (tmp_path / "a" / "from-0").write_bytes(b"cut")
    assert find_unseen(tmp_path / "a", ["from-0"], 0) == ["from-0"]
    assert list((tmp_path / "a").iterdir()) == [tmp_path / "a" / "from-0"]


def test_a_place_that_cannot_be_written_says_why() -> None:
    assert write_file(Path("/proc/layerplan"), "from-0").startswith(("FileNotFoundError:", "PermissionError:"))


def test_this_machine_tells_what_it_has(tmp_path: Path) -> None:
    facts = read_facts("here")
    assert facts.versions["torch"] == distribution("torch").version
    assert facts.hashes["layerplan"] == hash_source("layerplan") != "not found"
    assert facts.memory >= facts.available > 0
    assert facts.free["/dev/shm"] <= shutil.disk_usage("/dev/shm").total


def test_one_changed_byte_is_another_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "tidepool"
    package.mkdir()
    (package / "__init__.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = hash_source("tidepool")
    (package / "__init__.py").write_text("x = 2\n")
    assert hash_source("tidepool") != before
    assert hash_installation(distribution("torch")) == hash_installation(distribution("torch"))
    assert hash_installation(distribution("torch")) != hash_installation(distribution("numpy"))


def test_devices_are_read_from_nvidia_smis_lines() -> None:
    assert parse_devices("NVIDIA H200, 143771\nNVIDIA H200, 143771\n") == (("NVIDIA H200", 143771 * 2**20),) * 2
    assert parse_devices("No devices were found\n") == ()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--min-nodes", "0"], "--min-nodes 0: at least 1 is expected"),
        (["--storage", "runs"], "--storage runs: an absolute path, the same on every node, or an address is expected"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cluster", "check", *arguments]) == 2
    assert said in capsys.readouterr().err
