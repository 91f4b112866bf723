"""What lies under a name may be another thing tomorrow: what was made of the one is not taken for the other's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from eval.engine import EngineAnswer, EngineSpec
from eval.pool import Ledger
from layerplan.artifacts import write_text
from layerplan.config.run import RunConfig
from layerplan.config.trace import TraceConfig
from layerplan.errors import ModelError, ProbeError
from layerplan.models.ref import ModelRef
from layerplan.pipeline.measure_layers import is_of_other_steps
from layerplan.pipeline.same_base import check_same_base
from layerplan.plan.layer_measurement import LayerMeasurement, MeasuringCost
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.run_folder import RunFolder
from layerplan.tracer.pool import load_profile
from layerplan.tracer.probes import collect_probes, hash_probes
from layerplan.tracer.samples import Sample, measure_samples, write_records
from tests.layer_profiles import make_profile
from tests.model_folders import edit_config, edit_weights, save_base_with_code, save_tiny_base


def double_the_norm(tensors: dict[str, Any]) -> None:
    tensors["model.norm.weight"] = 2 * tensors["model.norm.weight"]


@pytest.fixture
def base(tmp_path: Path) -> ModelRef:
    return ModelRef(str(save_tiny_base(tmp_path / "base")))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    (tmp_path / "run").mkdir()
    return RunFolder(tmp_path / "run")


MADE = ("self_test", "profile", "measured", "measurements", "plan", "samples", "sweep")


@pytest.mark.parametrize("made", [*MADE, "scores"])
def test_a_base_with_other_weights_is_refused_once_something_was_made_with_the_first(
    base: ModelRef, run: RunFolder, made: str
) -> None:
    check_same_base(run, base)
    path = run.scores_of("base") / "ceval.json" if made == "scores" else getattr(run, made)
    write_text(path, "{}")
    check_same_base(run, base)
    edit_weights(Path(base.name), double_the_norm)
    with pytest.raises(ModelError, match=r"base: its weights changed since .*run was begun; restore what was there"):
        check_same_base(run, base)


def test_a_base_may_be_mended_until_something_was_made_with_it(base: ModelRef, run: RunFolder) -> None:
    check_same_base(run, base)
    edit_weights(Path(base.name), double_the_norm)
    check_same_base(run, base)
    assert json.loads(run.base_files.read_text())["weights"] == base.identity().weights_sha256
    write_text(run.plan, "{}")
    check_same_base(run, base)


def test_of_a_config_the_values_count_and_not_how_they_are_written(base: ModelRef, run: RunFolder) -> None:
    """Another base of the rotary positions, say, is another model with the same weights."""
    check_same_base(run, base)
    write_text(run.plan, "{}")
    config = Path(base.name) / "config.json"
    values = dict(reversed(json.loads(config.read_text()).items())) | {"transformers_version": "9.9"}
    config.write_text(json.dumps(values, indent=7))
    check_same_base(run, base)
    edit_config(Path(base.name), rms_norm_eps=0.5)
    with pytest.raises(ModelError, match="its config changed since"):
        check_same_base(run, base)


def test_code_counts_where_it_may_run(tmp_path: Path, run: RunFolder) -> None:
    folder = save_base_with_code(tmp_path / "own")
    allowed = ModelRef(str(folder), trust_remote_code=True)
    check_same_base(run, allowed)
    write_text(run.plan, "{}")
    (folder / "modeling_tidal.py").write_text((folder / "modeling_tidal.py").read_text() + "\n# another\n")
    with pytest.raises(ModelError, match="its code changed since"):
        check_same_base(run, allowed)
    check_same_base(run, replace(allowed, trust_remote_code=False))


def test_a_run_of_a_version_that_noted_no_base_goes_on(base: ModelRef, run: RunFolder) -> None:
    write_text(run.plan, "{}")
    check_same_base(run, base)
    edit_weights(Path(base.name), double_the_norm)
    with pytest.raises(ModelError, match="its weights changed"):
        check_same_base(run, base)


def test_a_folder_that_is_replaced_is_another_model_in_the_same_process_too(base: ModelRef) -> None:
    identity, shape = base.identity(), base.shape()
    edit_weights(Path(base.name), double_the_norm)
    assert base.identity().weights_sha256 != identity.weights_sha256
    edit_config(Path(base.name), intermediate_size=shape.hidden_size)
    assert base.shape().total_params < shape.total_params


def test_answers_of_a_model_that_lay_in_the_folder_before_are_not_taken_over(base: ModelRef, tmp_path: Path) -> None:
    spec = EngineSpec(base, "transformers", "float32", 0, (1, 2, 3, 4), 8)

    def open_ledger(asked: EngineSpec) -> Ledger:
        return Ledger(tmp_path / "ledger", ["p"], asked, model_files=asked.model.hash_files())

    with open_ledger(spec) as ledger:
        ledger.add({"index": [0], "logprobs": [[-1.0]], "token_ids": ["[7]"], "output": ["A"], "pid": [1]})
    assert open_ledger(spec).answers == {0: EngineAnswer((-1.0,), [7], "A")}
    assert open_ledger(replace(spec, num_gpus=1)).answers == {}, "`auto` is another dtype there"
    edit_weights(Path(base.name), double_the_norm)
    assert open_ledger(spec).answers == {}


def test_prompts_edited_under_their_ids_are_not_those_that_were_measured(tmp_path: Path) -> None:
    """Ids of a `jsonl` task are numbers of lines, so that a measurement that a kill left fits whatever stands there now."""
    path, samples = tmp_path / "train.parquet", [Sample("train/0", (5, 6), 1), Sample("train/1", (7,), 2)]
    found = [{"id": each.id, "label_id": each.label_id, "predicted_id": 0} for each in samples]
    write_records(path, samples, found)
    assert measure_samples(ModelRef("m"), samples, TraceConfig(), path=path) == found
    edited = [Sample("train/0", (5, 9), 1), samples[1]]
    with pytest.raises(ProbeError, match=r"train\.parquet: prompts of the same ids have other tokens or labels now"):
        measure_samples(ModelRef("m"), edited, TraceConfig(), path=path)
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
    assert measure_samples(ModelRef("m"), edited, TraceConfig(), path=path) == found, (
        "of a version that did not note it"
    )


@pytest.mark.parametrize(("max_steps", "is_other"), [(4, False), (5, False), (80, False), (81, True), (200, True)])
def test_a_pilot_is_a_share_of_the_steps_that_the_run_has_now(max_steps: int, is_other: bool) -> None:
    """5 % and at least 4: 4 steps up to 80, 5 for 81."""
    values = {"name": "run", "model": {"type": "pretrained", "name": "m"}, "train": {"max_steps": max_steps}}
    config = RunConfig.model_validate(values)
    cost = MeasuringCost(flops=1.0, seconds=1.0, tokens=1)
    pilot = LayerMeasurement(name="pilot", values=[1.0, 2.0], options={"steps": 4}, cost=cost)
    assert is_of_other_steps(pilot, config, ["pilot"]) == is_other
    assert not is_of_other_steps(pilot, config, ["fisher"]) and not is_of_other_steps(None, config, ["pilot"])


def test_a_profile_of_other_probes_is_refused(tmp_path: Path) -> None:
    file, path = tmp_path / "probes.jsonl", tmp_path / "layer_profile.json"
    line = {"id": "x", "group": "g", "prompt": "Paris: France. Rome:", "answer": " Italy", "context_end": 15}
    file.write_text(json.dumps(line), encoding="utf-8")
    config = TraceConfig(probes=str(file))
    identity = ModelIdentity(name="m", model_type="qwen3", num_layers=3)
    found = hash_probes(collect_probes(config))
    profile = make_profile(identity, [0.0, 0.0, 0.0], [0.0, 0.0], probe_set_sha256=found)
    profile.save(path)
    assert load_profile(path, config).probe_set_sha256 == found
    file.write_text(json.dumps(line | {"answer": " Greece"}), encoding="utf-8")
    with pytest.raises(ProbeError, match=r"trace.probes=.*probes.jsonl: other probes than .*layer_profile.json was"):
        load_profile(path, config)
    assert load_profile(path, TraceConfig()) == profile
