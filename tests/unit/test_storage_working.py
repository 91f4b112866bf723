"""The path of a working folder says which address it stands for, on every node alike."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from layerplan.storage.paths import BucketPath, write_whole
from layerplan.storage.working import find_home, find_working_folder


@pytest.mark.parametrize("address", ["s3://bucket", "s3://bucket/deep/runs", "gs://anonymous@bucket/a.b", "gcs://b/c"])
def test_a_working_folder_leads_back_to_its_address(address: str, tmp_path: Path) -> None:
    folder = find_working_folder(address, str(tmp_path))
    assert folder.is_relative_to(tmp_path)
    assert str(find_home(folder / "run" / "report.html")) == f"{address}/run/report.html"
    assert find_working_folder(address + "/", str(tmp_path)) == folder


def test_a_local_folder_is_its_own_home(tmp_path: Path) -> None:
    assert find_home(tmp_path / "run") == tmp_path / "run"


def test_two_addresses_never_share_a_folder(tmp_path: Path) -> None:
    addresses = ["s3://a/b", "gs://a/b", "s3://a/c", "s3://b/a"]
    assert len({find_working_folder(address, str(tmp_path)) for address in addresses}) == len(addresses)


def test_a_path_in_a_bucket_travels_as_its_address_alone() -> None:
    path = BucketPath("s3://bucket/run") / "checkpoints" / "step_00000002"
    assert (path.name, str(path.parent), str(path.with_name("x"))) == (
        "step_00000002",
        "s3://bucket/run/checkpoints",
        "s3://bucket/run/checkpoints/x",
    )
    assert pickle.loads(pickle.dumps(path)) == path and vars(path) == {"address": str(path)}


def test_a_small_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", b"one")
    write_whole(tmp_path / "a", b"two")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == b"two"
