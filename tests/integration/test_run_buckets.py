"""Runs kept on servers that speak S3 and GCS: folder, lease, checkpoints and training, as they are in a folder."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

from layerplan.artifacts import read_lines
from layerplan.checkpoint.index import (
    choose_checkpoint,
    find_run_id,
    inspect_checkpoints,
    list_checkpoints,
    prove_candidate,
    prune_checkpoints,
    set_aside,
)
from layerplan.config.plan import FreezeShallowPlanConfig
from layerplan.config.run import RunConfig
from layerplan.config.train import ScheduleConfig, TrainConfig
from layerplan.errors import ConfigError, RunBusyError, StorageError
from layerplan.models.files import identify_model, load_hf_config
from layerplan.models.ref import ModelRef
from layerplan.pipeline.run_folder import open_run_folder
from layerplan.pipeline.run_lease import hold_run
from layerplan.pipeline.status import read_status
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_plan
from layerplan.storage.address import _open_bucket
from layerplan.storage.flag import Flag
from layerplan.storage.mirror import carry_file, fetch_file, fetch_folder
from layerplan.storage.paths import BucketPath
from layerplan.storage.working import find_home, find_working_folder
from layerplan.tracking.journal import Journal
from layerplan.tracking.jsonl import JsonlSink
from layerplan.train.request import TrainRequest
from tests.buckets import BucketServer
from tests.tiny_checkpoint import FRESH, RUN_ID, load, save
from tests.tiny_store import make_inputs
from tests.worker_zygote import forked_workers

BUCKET = "stored-runs"


@pytest.fixture(scope="module", params=["s3_server", "gcs_server"], ids=["s3", "gcs"])
def server(request: pytest.FixtureRequest) -> Iterator[BucketServer]:
    made: BucketServer = request.getfixturevalue(request.param)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in [*made.keys.items(), made.environment]:
            patch.setenv(name, value)
        made.make(BUCKET)
        yield made


@pytest.fixture
def config(server: BucketServer, tmp_path: Path) -> RunConfig:
    values = {"name": tmp_path.name, "model": {"type": "pretrained", "name": "some/model"}}
    return RunConfig.model_validate(
        values | {"storage_path": f"{server.scheme}{BUCKET}/deep/", "working_path": str(tmp_path / "here")}
    )


def move(config: RunConfig, tmp_path: Path) -> RunConfig:
    """The run on a machine that has nothing of it."""
    return config.model_copy(update={"working_path": str(tmp_path / "elsewhere")})


def list_folder(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_folder_is_rebuilt_from_its_bucket(config: RunConfig, tmp_path: Path) -> None:
    folder = open_run_folder(config)
    assert (tmp_path / "here" / "layerplan_mirrors").stat().st_mode & 0o077 == 0, "others cannot read it"
    written = {
        "freeze_plan.json": b"{}",
        "hf/step_00000002/model.safetensors": b"w" * 3000,
        "evaluation/base/a.json": b"1",
    }
    written |= {
        "base_model/hf/checkpoints/notes.txt": b"a folder of the model's own",
        "token_store/manifest.json": b"{}",
    }
    local = {"hf/step_3.partial/half": b"", "report.html.partial": b"", "stop_requested": b"", "lease-a.json": b"{}"}
    local |= {"token_store/shard_000000.parquet": b"1", "metrics.jsonl": b"{}\n", "checkpoints/step_2/seal.json": b"{}"}
    for name, content in (written | local).items():
        (folder.root / name).parent.mkdir(parents=True, exist_ok=True)
        (folder.root / name).write_bytes(content)
    folder.carry()
    carried = list_folder(folder.root).keys() - local.keys()

    other = open_run_folder(move(config, tmp_path))
    there = list_folder(other.root)
    assert there.keys() == carried == written.keys() | {"resolved_config.json"}
    assert all(there[name] == content for name, content in written.items())

    (other.root / "freeze_plan.json").write_bytes(b"[3]")  # S3 tells times to the second, so another size
    shutil.rmtree(other.root / "evaluation")
    (other.root / "verdicts.json").write_bytes(b"of there")
    other.carry()
    (folder.root / "report.html").write_bytes(b"not carried yet")
    again = open_run_folder(config)
    assert (again.root / "freeze_plan.json").read_bytes() == b"[3]", "the bucket has the newer one"
    assert (again.root / "verdicts.json").read_bytes() == b"of there"
    assert (again.root / "report.html").exists(), "what is here alone stays"
    assert find_home(again.root / "evaluation/base/a.json").exists(), "what was lost here is not removed there"
    again.carry()
    assert find_home(again.root / "report.html").read_bytes() == b"not carried yet"


def test_what_grows_is_carried_by_whole_lines_and_a_folder_fetched_by_any_process(
    config: RunConfig, tmp_path: Path
) -> None:
    folder, other = open_run_folder(config), open_run_folder(move(config, tmp_path))
    folder.metrics.write_text('{"step": 1}\n{"st')
    carry_file(folder.metrics)
    fetch_file(other.metrics)
    assert other.metrics.read_text() == '{"step": 1}\n'
    model = folder.root / "hf" / "step_00000004"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    folder.carry()
    times = [path.stat().st_mtime_ns for path in model.iterdir()]
    fetch_folder(model)
    assert [path.stat().st_mtime_ns for path in model.iterdir()] == times, "what is the same is not fetched again"
    fetch_folder(other.root / "hf" / "step_00000004")
    assert (other.root / "hf" / "step_00000004" / "config.json").read_text() == "{}"


def test_a_stop_that_is_asked_for_on_one_machine_is_seen_on_another(config: RunConfig, tmp_path: Path) -> None:
    mine, other = (Flag(open_run_folder(each).root / "stop_requested") for each in (config, move(config, tmp_path)))
    assert not mine.exists() and not other.exists()
    mine.touch()
    assert mine.exists() and not other.exists(), "the bucket was asked a moment ago"
    assert Flag(other.path).exists()
    mine.unlink()
    assert not mine.exists() and not Flag(other.path).exists()


def test_another_config_under_the_same_name_is_refused_on_a_new_machine(config: RunConfig, tmp_path: Path) -> None:
    open_run_folder(config)
    with pytest.raises(ConfigError, match="exists with seed=0, this config has 1"):
        open_run_folder(move(config, tmp_path).model_copy(update={"seed": 1}))


def test_a_bucket_that_is_not_there_is_one_line(config: RunConfig) -> None:
    missing = config.model_copy(update={"storage_path": config.storage_path.replace(BUCKET, "no-such-bucket")})
    with pytest.raises(StorageError, match=r"no-such-bucket/deep/.*resolved_config.json: .*submit the same run name"):
        open_run_folder(missing)


def test_a_killed_jobs_journal_is_not_cut_back_to_what_was_carried(config: RunConfig, tmp_path: Path) -> None:
    """The bucket has what was carried; a job on the same machine goes on with the lines that came after."""
    folder, other = open_run_folder(config), open_run_folder(move(config, tmp_path))
    path = folder.root / "tracking" / "lineage.jsonl"
    journal = Journal(path)
    journal.append({"do": "one"})
    folder.carry()
    journal.append({"do": "two"})
    assert [line["do"] for line in read_lines(open_run_folder(config).root / "tracking/lineage.jsonl")] == [
        "one",
        "two",
    ]
    assert other.mirror is not None
    other.mirror.fetch()
    Journal(other.root / "tracking" / "lineage.jsonl").append({"do": "elsewhere"})
    other.carry()
    journal.append({"do": "of nobody"})
    lines = read_lines(open_run_folder(config).root / "tracking/lineage.jsonl")
    assert [line["do"] for line in lines] == ["one", "two", "elsewhere"], "what the bucket has is the truth"


def test_the_status_of_a_run_is_read_from_its_bucket(config: RunConfig) -> None:
    folder = open_run_folder(config)
    sink = JsonlSink(folder.metrics, "train", 0)
    address = str(find_home(folder.root))
    for step in (1, 500):
        sink.log_metrics({"train/loss": 4.0 - step / 500, "perf/step_s": 1.0}, step)
        carry_file(folder.metrics)
        with hold_run(BucketPath(address), config.name):
            status = read_status(address, datetime.now(UTC))
        assert status.is_running and dict(status.rows)["run"] == address
        assert f" {step:,} of 1,000 steps" in dict(status.rows)["training"]
    assert not read_status(address, datetime.now(UTC)).is_running
    with pytest.raises(ConfigError, match="is no run folder"):
        read_status(f"{address}-other", datetime.now(UTC))


def test_a_bucket_holds_a_lease_as_a_disk_does(server: BucketServer, tmp_path: Path) -> None:
    """None of its files is moved, linked or locked."""
    root = BucketPath(f"{server.scheme}{BUCKET}/{tmp_path.name}/r")
    with hold_run(root, "r", beat_s=0.05):
        (lease,) = root.list_files()
        assert lease.name.startswith("lease-")
        with pytest.raises(RunBusyError, match=f"is being run by process {os.getpid()}"), hold_run(root, "r"):
            pass
        first = json.loads((root / lease.name).read_text())["beat"]
        while json.loads((root / lease.name).read_text())["beat"] == first:
            pass
    assert root.list_files() == []
    with pytest.raises(RunBusyError, match="was removed by another"), hold_run(root, "r", beat_s=0.05):
        (root / root.list_files()[0].name).unlink()
        time.sleep(20)


def test_a_checkpoint_in_a_bucket_is_the_checkpoint_in_a_folder(server: BucketServer, tmp_path: Path) -> None:
    checkpoints = BucketPath(f"{server.scheme}{BUCKET}/{tmp_path.name}/checkpoints")
    assert list_checkpoints(checkpoints) == [] and find_run_id(checkpoints) == find_run_id(checkpoints)
    (checkpoints / "run_id").write_text(RUN_ID)
    there = [save(checkpoints, step) for step in (2, 4, 6)]
    here = [save(tmp_path, step) for step in (2, 4, 6)]
    seals = [json.loads((path / "seal.json").read_text())["files"]["__0_0.distcp"] for path in (*there, *here)]
    assert seals[:3] == seals[3:]
    for remote, local in zip(load(there[1]), load(here[1]), strict=True):
        assert torch.equal(remote, local)

    shard = there[2] / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    (there[1] / "seal.json").unlink()
    candidates = inspect_checkpoints(checkpoints, FRESH.check_same_run, RUN_ID)
    choice = choose_checkpoint(candidates, prove_candidate)
    assert choice.used is not None and choice.used.path == there[0]
    assert [(each.path, each.is_finished) for each in choice.passed_over] == [(there[2], True), (there[1], False)]
    assert f"{shard}: not the bytes that were written" in choice.describe()
    set_aside(choice)
    assert list_checkpoints(checkpoints) == [there[0]]
    aside = checkpoints / "set_aside" / there[2].name
    assert sorted(path.name for path in aside.iterdir()) == ["reason.txt", "seal.json", "train_state.json"]
    save(checkpoints, 8)
    prune_checkpoints(checkpoints, 1)
    assert not any((path / "__0_0.distcp").exists() for path in there)
    assert [path.name for path in list_checkpoints(checkpoints)] == ["step_00000008"]


def test_a_bucket_that_does_not_answer_is_not_a_damaged_checkpoint(
    s3_server: BucketServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is gone between the listing and the reading of the shards: nothing may be set aside for that."""
    for name, value in [*s3_server.keys.items(), s3_server.environment]:
        monkeypatch.setenv(name, value)
    s3_server.make("leaves")
    checkpoints = BucketPath("s3://leaves/checkpoints")
    save(checkpoints, 2)
    (candidate,) = inspect_checkpoints(checkpoints, FRESH.check_same_run, RUN_ID)
    assert candidate.seal is not None and not candidate.fault
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    _open_bucket.cache_clear()
    with pytest.raises(StorageError, match=r"s3://leaves/checkpoints/step_00000002/.*once it can be reached"):
        prove_candidate(candidate)
    _open_bucket.cache_clear()


@pytest.mark.long
def test_training_goes_on_from_the_bucket_alone(
    gcs_server: BucketServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints, ledger and resume of Ray Train on GCS, as the whole chain shows for S3; the weights are a folder's."""
    import ray

    from layerplan.train.trainer import run_training

    ray.shutdown()  # workers of a Ray that runs already would not see the environment
    monkeypatch.setenv(*gcs_server.environment)
    gcs_server.make("trained")
    with forked_workers():
        ray.init(address="local", num_cpus=4, include_dashboard=True, log_to_driver=False, configure_logging=False)
    make_inputs(tmp_path)
    address = f"{gcs_server.scheme}trained"
    here, there = (find_working_folder(address, str(tmp_path / machine)) / "r" for machine in ("one", "two"))
    run_training(make_request(here, tmp_path, max_steps=4))
    assert not list(here.rglob("step_*/*.distcp"))
    shutil.rmtree(tmp_path / "one")
    moved = run_training(make_request(there, tmp_path, max_steps=8))
    quiet = run_training(make_request(tmp_path / "quiet", tmp_path, max_steps=8))
    assert moved.hf_dir is not None and quiet.hf_dir is not None
    weights = [(result.hf_dir / "model.safetensors").read_bytes() for result in (moved, quiet)]
    assert weights[0] == weights[1]
    assert (find_home(there) / "ledger.jsonl").read_bytes() == (tmp_path / "quiet/ledger.jsonl").read_bytes()
    assert list_checkpoints(find_home(there) / "checkpoints")[0].name == "step_00000008"
    ray.shutdown()


def make_request(run_dir: Path, folder: Path, *, max_steps: int) -> TrainRequest:
    base = str(folder / "base")
    plan = make_plan(
        FreezeShallowPlanConfig(boundary=1),
        model=identify_model(base),
        shape=ModelShape.from_hf_config(load_hf_config(base)),
    )
    config = TrainConfig(
        max_steps=max_steps,
        global_batch_size=4,
        micro_batch_size=2,
        num_workers=1,
        num_cpus_per_worker=0.5,
        compute_dtype="float32",
        checkpoint_every_steps=2,
        write_ledger=True,
        schedule=ScheduleConfig(type="constant", warmup_ratio=0.0),
    )
    return TrainRequest(run_dir, ModelRef(base), plan, folder / "store", config, seed=0)
