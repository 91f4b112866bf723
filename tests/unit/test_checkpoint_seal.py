"""A checkpoint is what was written, or it is not used: every way to damage one is caused here on purpose."""

from __future__ import annotations

import json
import logging
import random
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import xxhash

from layerplan.checkpoint.dcp import load_trained_tensors, save_checkpoint
from layerplan.checkpoint.index import (
    clear_checkpoint,
    find_run_id,
    list_checkpoints,
    prove_checkpoint,
    prune_checkpoints,
)
from layerplan.checkpoint.layout import read_train_state
from layerplan.checkpoint.seal import mark_file, read_seal
from layerplan.errors import CheckpointError
from layerplan.run_folder import AWAITS_NAME, SEAL_NAME, STATE_NAME, name_step
from layerplan.train.checkpoint_writer import CheckpointWriter
from layerplan.train.resume import RAY_INDEX_NAME, check_resumable, find_resume, reset_ray_index
from tests.tiny_checkpoint import FRESH, RUN_ID, build, load, make_old, save

SHARD = "__0_0.distcp"
OLD = Path(__file__).parent / "data" / "step_00000030"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save(folder, 10)
    save(folder, 20)
    (folder / "run_id").write_text(RUN_ID)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """Steps 10 and 20 of one run."""
    return shutil.copytree(saved, tmp_path / "checkpoints")


def resume(folder: Path, caplog: pytest.LogCaptureFixture) -> tuple[str, str]:
    """Name of the checkpoint that is used, and the line that was said."""
    caplog.clear()
    caplog.set_level(logging.INFO, "layerplan")
    found = find_resume(folder, FRESH, rank=0)
    return found.checkpoint.name if found.checkpoint else "", "".join(f"{line}\n" for line in caplog.messages)


def test_a_seal_states_size_and_hash_of_every_file(folder: Path) -> None:
    seal = read_seal(folder / "step_00000020")
    assert seal is not None and (seal.step, seal.plan_sha256, seal.run_id) == (20, "plan", RUN_ID)
    files = {path.name: path.read_bytes() for path in (folder / "step_00000020").iterdir() if path.name != SEAL_NAME}
    assert set(files) == {SHARD, ".metadata", STATE_NAME}
    for name, content in files.items():
        assert seal.files[name].size == len(content)
        assert seal.files[name].xxh3_128 == xxhash.xxh3_128_hexdigest(content)


def test_a_save_in_the_background_keeps_the_values_of_its_step_and_marks_every_file(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, optimizer = build(20)
        wanted = model.weight.detach().clone()
        saving = save_checkpoint(tmp_path, model, optimizer, dist.new_group(backend="gloo"))
        with torch.no_grad():
            model.weight.zero_()
        saving.wait()
        assert torch.equal(load_trained_tensors(tmp_path, {"weight": wanted})["weight"], wanted)
    finally:
        dist.destroy_process_group()
    assert saving.marks == {path.name: mark_file(path) for path in tmp_path.iterdir()}


def test_the_newest_whole_checkpoint_is_used_without_a_word(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert resume(folder, caplog) == ("step_00000020", "")
    weights = load(folder / "step_00000020")
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(weights, build(20)[0].parameters()))


def test_none_of_100_flipped_bits_is_used(tmp_path: Path) -> None:
    path = save(tmp_path, 20)
    rng = random.Random(17)
    files = sorted(path.iterdir())
    for _ in range(100):
        file = rng.choice(files)
        content = file.read_bytes()
        bit = rng.randrange(len(content) * 8)
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=file.name.replace(".", r"\.")):
            prove_checkpoint(path, "plan")
        with pytest.raises(CheckpointError, match=file.name.replace(".", r"\.")):
            find_resume(tmp_path, FRESH, rank=0)
        file.write_bytes(content)
    prove_checkpoint(path, "plan")


@pytest.mark.parametrize("name", [SHARD, ".metadata", STATE_NAME, SEAL_NAME])
@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "gone"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(
    folder: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    file = folder / "step_00000020" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    damaged = {"flipped": bytes(content), "cut": file.read_bytes()[:-7], "empty": b""}
    file.write_bytes(damaged[damage]) if damage != "gone" else file.unlink()
    used, line = resume(folder, caplog)
    assert used == "step_00000010"
    assert line.count("\n") == 1 and "going on from step_00000010" in line
    if (name, damage) == (SEAL_NAME, "gone"):
        assert "step_00000020 was never finished" in line
    else:
        assert f"step_00000020/{name}" in line
        assert (folder / "set_aside/step_00000020/reason.txt").exists()
        assert resume(folder, caplog) == ("step_00000010", ""), "it is said once"


def test_shards_of_another_step_are_found(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copyfile(folder / "step_00000010" / SHARD, folder / "step_00000020" / SHARD)
    used, line = resume(folder, caplog)
    assert used == "step_00000010" and f"step_00000020/{SHARD}: not the bytes that were written" in line


def test_going_back_in_a_running_training_proves_the_checkpoint_again(folder: Path) -> None:
    model, optimizer = build(999)
    writer = CheckpointWriter(folder, model, optimizer, None, 0, find_resume(folder, FRESH, rank=0))
    for step in (20, 20, 10):
        if step == 10:
            shutil.copyfile(folder / "step_00000010" / SHARD, folder / "step_00000020" / SHARD)
        state = writer.restore()
        assert state is not None and state.step == step
        assert torch.equal(model.weight, build(step)[0].weight)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("step", "its seal is of step 10"), ("run", "of another run"), ("plan", "its plan_sha256 is other")],
)
def test_a_checkpoint_from_elsewhere_is_set_aside(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture, kind: str, words: str
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    foreign = {
        "step": lambda: folder / "step_00000010",
        "run": lambda: save(elsewhere, 30, run_id="f" * 32),
        "plan": lambda: save(elsewhere, 30, plan="other"),
    }[kind]()
    shutil.copytree(foreign, folder / "step_00000030")
    used, line = resume(folder, caplog)
    assert used == "step_00000020" and words in line and "step_00000030 is set aside" in line


def test_files_without_a_seal_are_unfinished_and_written_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "step_00000020" / SEAL_NAME).unlink()
    used, line = resume(folder, caplog)
    assert used == "step_00000010" and "step_00000020 was never finished" in line
    assert [path.name for path in list_checkpoints(folder)] == ["step_00000010"]
    clear_checkpoint(folder / "step_00000020")
    assert list((folder / "step_00000020").iterdir()) == []


def test_a_run_killed_in_its_first_save_begins_again_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert resume(tmp_path, caplog) == ("", "")
    (save(tmp_path, 10) / SEAL_NAME).unlink()
    used, line = resume(tmp_path, caplog)
    assert used == "" and "step_00000010 was never finished; training begins at step 0" in line


def test_a_checkpoint_from_before_there_were_seals_is_used_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The one at hand was written by the last version without."""
    path = shutil.copytree(OLD, folder / "step_00000030")
    used, line = resume(folder, caplog)
    assert used == "step_00000030" and "warning: step_00000030 has no seal" in line
    assert "has no seal" in prove_checkpoint(path, "plan")
    assert read_train_state(path)["step"] == 30
    for mine, theirs in zip(load(path), build(30)[0].parameters()):
        torch.testing.assert_close(mine, theirs.detach())


@pytest.mark.parametrize("name", [SHARD, ".metadata", STATE_NAME])
def test_an_old_checkpoint_that_is_cut_is_set_aside_too(
    folder: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    for step in (10, 20):
        make_old(folder / name_step(step))
    file = folder / "step_00000020" / name
    file.write_bytes(file.read_bytes()[:-7])
    used, line = resume(folder, caplog)
    assert used == "step_00000010" and f"step_00000020/{name}" in line


def test_without_one_good_checkpoint_training_does_not_begin_again(folder: Path) -> None:
    for step in (10, 20):
        (folder / name_step(step) / SHARD).write_bytes(b"")
    words = r"none of 2 checkpoints .*step_00000020/__0_0.distcp: has 0 bytes.*move"
    with pytest.raises(CheckpointError, match=words):
        find_resume(folder, FRESH, rank=0)
    assert len(list_checkpoints(folder)) == 2, "nothing was moved"


def test_a_run_of_another_plan_is_refused_before_anything_is_started(folder: Path) -> None:
    check_resumable(folder, FRESH)
    check_resumable(folder / "nothing here", FRESH)
    with pytest.raises(CheckpointError, match=r"none of 2 checkpoints .*its plan_sha256 is plan, this run has new"):
        check_resumable(folder, FRESH.model_copy(update={"plan_sha256": "new"}))
    (folder / "step_00000020" / SHARD).write_bytes(b"")
    check_resumable(folder, FRESH)


def test_pruning_keeps_the_newest_those_in_use_and_those_awaiting_validation(tmp_path: Path) -> None:
    paths = {step: save(tmp_path, step) for step in (10, 20, 30, 40, 50, 60)}
    (paths[20] / AWAITS_NAME).touch()
    (paths[50] / SEAL_NAME).unlink()  # unfinished: does not count as one that is kept
    prune_checkpoints(tmp_path, 2, in_use=(paths[10],))
    assert sorted(path.name for path in tmp_path.glob("step_*")) == [name_step(s) for s in (10, 20, 40, 50, 60)]


def test_the_id_of_a_run_is_drawn_once_and_found_again(tmp_path: Path) -> None:
    first = find_run_id(tmp_path / "a")
    assert find_run_id(tmp_path / "a") == first != find_run_id(tmp_path / "b")
    save(tmp_path, 10)
    (tmp_path / "run_id").write_bytes(b"\xff garbage")
    assert find_run_id(tmp_path) == RUN_ID, "the newest seal knows it"


@pytest.mark.parametrize("content", [None, b"", b'{"ray_version": "2', b"[]"])
def test_whatever_ray_kept_does_not_matter(
    folder: Path, caplog: pytest.LogCaptureFixture, content: bytes | None
) -> None:
    if content is not None:
        (folder / RAY_INDEX_NAME).write_bytes(content)
    reset_ray_index(folder)
    assert not (folder / RAY_INDEX_NAME).exists()
    assert resume(folder, caplog)[0] == "step_00000020"


def test_ray_takes_up_again_what_awaits_its_validation(folder: Path) -> None:
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState

    (folder / "step_00000010" / AWAITS_NAME).touch()
    reset_ray_index(folder)
    read = _CheckpointManagerState.parse_obj(json.loads((folder / RAY_INDEX_NAME).read_text()))
    assert [each.checkpoint_dir_name for each in read.pending_training_results] == ["step_00000010"]
    assert read.pending_validation_specs == [True]
