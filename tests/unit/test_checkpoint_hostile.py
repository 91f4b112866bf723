"""Nothing in a checkpoint is run, and garbage ends in one line that names the file."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from layerplan.checkpoint.dcp import load_trained_tensors
from layerplan.checkpoint.index import prove_checkpoint
from layerplan.checkpoint.layout import read_train_state
from layerplan.checkpoint.metadata import METADATA_NAME, read_metadata
from layerplan.checkpoint.seal import Seal, mark_bytes, read_seal, write_seal
from layerplan.errors import CheckpointError
from layerplan.run_folder import SEAL_NAME, STATE_NAME
from layerplan.train.resume import find_resume
from layerplan.train.state import TrainState
from tests.garbage import GARBAGE
from tests.tiny_checkpoint import FRESH, RUN_ID, load, make_old, save

LIKE = {"weight": torch.empty(4, 8)}
READERS: dict[str, Callable[[Path], Any]] = {
    "resume": lambda path: find_resume(path.parent, FRESH, rank=0),
    "restore": load,
    "export": lambda path: (prove_checkpoint(path, "plan"), load_trained_tensors(path, LIKE)),
    "load": lambda path: load_trained_tensors(path, LIKE),
}


class Shell:
    """A pickle of it calls a shell command when it is read."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.proof}",)


def write_metadata(path: Path, value: Any) -> None:
    (path / METADATA_NAME).write_bytes(pickle.dumps(value))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save(tmp_path_factory.mktemp("saved"), 10)
    make_old(path)
    (path.parent / "run_id").write_text(RUN_ID)
    return path


@pytest.fixture
def old(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint without a seal: nothing but the readers themselves protects."""
    return shutil.copytree(saved.parent, tmp_path / "checkpoints") / saved.name


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("is_hidden", [False, True], ids=["alone", "inside real metadata"])
def test_a_shell_command_in_the_metadata_is_not_run(old: Path, tmp_path: Path, reader: str, is_hidden: bool) -> None:
    proof = tmp_path / "executed"
    hostile: Any = Shell(proof)
    if is_hidden:
        hostile = FileSystemReader(old).read_metadata()
        hostile.planner_data = Shell(proof)
    write_metadata(old, hostile)
    with pytest.raises(CheckpointError, match=rf"{METADATA_NAME}: refused \(it names posix\.system"):
        READERS[reader](old)
    assert not proof.exists()
    pickle.loads((old / METADATA_NAME).read_bytes())
    assert proof.exists(), "the payload does not work"


def test_a_pickle_where_a_tensor_should_be_is_not_run(old: Path, tmp_path: Path) -> None:
    """PyTorch reads an object that is no tensor with `torch.load(weights_only=False)`, whatever was asked for."""
    proof = tmp_path / "executed"
    buffer = io.BytesIO()
    torch.save(Shell(proof), buffer)
    (old / "evil.distcp").write_bytes(buffer.getvalue())
    places = {MetadataIndex("model.weight"): _StorageInfo("evil.distcp", 0, len(buffer.getvalue()))}
    write_metadata(
        old, Metadata({"model.weight": BytesStorageMetadata()}, {"model.weight": ("model", "weight")}, places)
    )
    with pytest.raises(CheckpointError, match=r"model\.weight: not a tensor"):
        load_trained_tensors(old, LIKE)
    assert not proof.exists()


def test_a_pickle_in_the_place_of_a_tensor_is_not_run(old: Path, tmp_path: Path) -> None:
    proof = tmp_path / "executed"
    buffer = io.BytesIO()
    torch.save(Shell(proof), buffer)
    metadata = FileSystemReader(old).read_metadata()
    index = next(index for index in metadata.storage_data if index.fqn == "model.weight")
    metadata.storage_data[index] = _StorageInfo("evil.distcp", 0, len(buffer.getvalue()))
    (old / "evil.distcp").write_bytes(buffer.getvalue())
    write_metadata(old, metadata)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_trained_tensors(old, LIKE)
    assert not proof.exists()


@pytest.mark.parametrize("place", ["../../secret", "/etc/passwd", "a/b", "..", "", 7, "\0"])
def test_no_path_leads_out_of_the_folder(old: Path, place: Any) -> None:
    metadata = FileSystemReader(old).read_metadata()
    next(iter(metadata.storage_data.values())).relative_path = place
    write_metadata(old, metadata)
    with pytest.raises(CheckpointError, match=r"not a tensor in a file of this folder"):
        read_metadata(old)


@pytest.mark.parametrize(
    ("name", "reader"),
    [
        (STATE_NAME, lambda path: TrainState.parse(read_train_state(path))),
        (SEAL_NAME, read_seal),
        (METADATA_NAME, read_metadata),
        *((name, READERS["resume"]) for name in (STATE_NAME, SEAL_NAME, METADATA_NAME)),
        *((name, READERS["export"]) for name in (SEAL_NAME, METADATA_NAME)),
    ],
)
def test_garbage_is_refused_in_one_line(old: Path, name: str, reader: Callable[[Path], Any]) -> None:
    for kind, content in GARBAGE.items():
        (old / name).write_bytes(content)
        with pytest.raises(CheckpointError) as raised:
            reader(old)
        message = str(raised.value)
        assert name in message and "\n" not in message, kind
        assert "pydantic" not in message and len(message) < 800, kind


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "sub/file", ""])
def test_a_seal_names_files_of_its_folder_only(tmp_path: Path, name: str) -> None:
    values = {"step": 1, "tokens_seen": 0, "plan_sha256": "", "corpus_sha256": "", "run_id": ""}
    marks = {STATE_NAME: mark_bytes(b""), name: mark_bytes(b"")}
    write_seal(tmp_path, Seal.model_construct(format=1, **values, files=marks))
    with pytest.raises(CheckpointError, match="not the name of a file in the folder"):
        read_seal(tmp_path)
