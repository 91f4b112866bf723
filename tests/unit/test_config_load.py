"""A config is strict, says every fault in one go, and survives the trip through its resolved file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from layerplan.config.load import dump_config, load_config, validate_config
from layerplan.config.train import TrainConfig
from layerplan.errors import ConfigError

MINIMAL = {"name": "run-1", "model": {"type": "scratch"}, "corpus": {"seq_len": 256}}
CONFIGS = sorted(Path("jobs/configs").glob("*.yaml"))


def faults_of(values: dict) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        validate_config(values)
    return caught.value.faults


def test_every_fault_is_one_line_with_field_value_and_what_is_allowed():
    faults = faults_of(
        {
            **MINIMAL,
            "model": {"type": "scratch", "hiden_size": 3},
            "train": {"max_stepz": 1, "optimizer": {"learning_rate": -1}},
            "plan": {"type": "freeze_deep", "boundry": 2},
        }
    )
    text = "\n".join(faults)
    assert "model.hiden_size: unknown key; did you mean 'hidden_size'?" in text
    assert "plan.boundry: unknown key; did you mean 'boundary'?" in text
    assert "train.max_stepz: unknown key; did you mean 'max_steps'?" in text
    assert "train.optimizer.learning_rate: Input should be greater than 0 (got -1)" in text
    assert all("\n" not in fault for fault in faults)


def test_a_name_that_cannot_be_a_folder_is_told_what_it_may_hold():
    (fault,) = faults_of({**MINIMAL, "name": "my run"})
    assert fault == (
        "name: letters A to Z in either case, digits, '.', '-' and '_' are allowed, a letter or digit first (got 'my run')"
    )


def test_an_unknown_key_inside_a_list_names_its_index():
    (fault,) = faults_of({**MINIMAL, "corpus": {"seq_len": 64, "sources": [{"path": "x", "wieght": 2}]}})
    assert fault.startswith("corpus.sources.0.wieght: unknown key; did you mean 'weight'?")


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (
            {"type": "freeze_dep"},
            "plan.type: 'freeze_dep' is unknown; did you mean 'freeze_deep'? allowed: block_influence, budget, explicit,",
        ),
        ({}, "plan.type: is required; allowed: block_influence, budget, explicit,"),
        (3, "plan: a mapping of fields is expected (got 3)"),
        ("full", "plan: a mapping of fields is expected, {type: full} (got 'full')"),
        (
            {"type": "schedule", "phases": [{"steps": 2, "plan": {"type": "freeze_deep", "boundry": 1}}]},
            "plan.phases.0.plan.boundry: unknown key; did you mean 'boundary'? allowed: boundary, modules, split_ratio,",
        ),
        (
            {"type": "schedule", "phases": [{"steps": 2, "plan": {"type": "ful"}}]},
            "plan.phases.0.plan.type: 'ful' is unknown; did you mean 'full'? allowed: block_influence, explicit,",
        ),
        (
            {"type": "schedule", "phases": [{"steps": 2, "plan": {"type": "freeze_deep", "boundary": "x"}}]},
            "plan.phases.0.plan.boundary: Input should be a valid integer",
        ),
    ],
)
def test_a_fault_inside_a_union_has_the_path_that_was_written(plan: object, said: str):
    faults = faults_of({**MINIMAL, "plan": plan})
    assert any(fault.startswith(said) for fault in faults), faults


def test_a_misspelt_field_of_a_copy_is_refused():
    config = TrainConfig()
    assert config.model_copy(update={"max_steps": 7}).max_steps == 7 and config.model_copy() == config
    with pytest.raises(TypeError, match="TrainConfig has no field 'max_stepz'"):
        config.model_copy(update={"max_stepz": 7})


def test_a_batch_that_workers_cannot_share_is_refused():
    (fault,) = faults_of({**MINIMAL, "train": {"global_batch_size": 6, "num_workers": 4}})
    assert "global_batch_size=6 must be a multiple of num_workers * micro_batch_size" in fault


def test_a_missing_model_is_named():
    (fault,) = faults_of({"name": "x"})
    assert fault == "model: is required"


def test_overrides_are_read_as_yaml_and_may_enter_lists(tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({**MINIMAL, "corpus": {"seq_len": 64, "sources": [{"path": "a"}]}}))
    config = load_config(path, ["train.max_steps=7", "corpus.sources.0.path=b", "plan.type=full", "cluster.num_cpus=2"])
    assert config.train.max_steps == 7
    assert config.corpus.sources[0].path == "b"
    assert config.plan.type == "full"
    assert config.cluster.num_cpus == 2


@pytest.mark.parametrize("override", ["train.max_steps", "=3", "train..x=1", "name.x=1", "corpus.sources.9.path=a"])
def test_a_malformed_override_names_itself(tmp_path: Path, override: str):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({**MINIMAL, "corpus": {"sources": [{"path": "a"}]}}))
    with pytest.raises(ConfigError, match=r"--set"):
        load_config(path, [override])


@pytest.mark.parametrize("content", [b"[1, 2]", b"a: [", b"\xff\xfe\x00", None])
def test_a_file_that_is_no_mapping_is_one_clear_error(tmp_path: Path, content: bytes | None):
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(path) in str(caught.value) and len(caught.value.faults) == 1


def test_the_resolved_config_is_accepted_again(tmp_path: Path):
    config = validate_config(MINIMAL)
    path = tmp_path / "resolved_config.json"
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_credentials_are_not_written_down_and_must_be_given_again(tmp_path: Path):
    source = {"path": "https://anna:hunter2@host/x.jsonl?token=hunter2"}
    values = {**MINIMAL, "tracking": {"uri": "http://anna:hunter2@host:5000"}}
    config = validate_config({**values, "corpus": {**MINIMAL["corpus"], "sources": [source]}})
    path = tmp_path / "resolved_config.json"
    path.write_text(dump_config(config))
    assert "hunter2" not in path.read_text() and "hunter2" not in repr(config.tracking)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    remedy = "its credentials were not written down; give it again with --set"
    assert caught.value.faults == (
        f"corpus.sources.0.path=https://***@host/x.jsonl?token=***: {remedy} corpus.sources.0.path=...",
        f"tracking.uri=http://***@host:5000: {remedy} tracking.uri=...",
    )
    given = [f"corpus.sources.0.path={source['path']}", "tracking.uri=http://anna:hunter2@host:5000"]
    assert load_config(path, given) == config


def test_no_fault_shows_a_credential(tmp_path: Path):
    path = tmp_path / "config.yaml"
    uri = "http://anna:hunter2@host"
    for text, overrides in (
        (f"tracking: {uri}", []),
        (f"{{tracking: {{uri: ['{uri}']}}}}", []),
        (f"tracking: {{uri: '{uri}'\nname: [", []),
        (f"tracking: {{uri: '{uri}'}}", ["tracking.uri.x=1"]),
        ("name: x", [f"tracking.uri:{uri}"]),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            load_config(path, overrides)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_is_valid(path: Path):
    assert load_config(path).name


def test_config_imports_no_engine():
    heavy = ["torch", "ray", "transformers", "vllm", "mlflow", "datasets"]
    code = f"import layerplan.config.run, sys; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
