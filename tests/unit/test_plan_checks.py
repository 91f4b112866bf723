"""A plan that cannot be made for the model is refused before anything is built, by a dry run and by a run, in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_model

from layerplan.config.plan import FreezeDeepPlanConfig
from layerplan.config.run import RunConfig
from layerplan.errors import PlanError
from layerplan.models.ref import ModelRef
from layerplan.pipeline.chain import continue_pretraining
from layerplan.pipeline.checks import check_plan, check_plan_of_made
from layerplan.pipeline.dry_run import print_dry_run
from layerplan.pipeline.run_folder import locate_run_folder
from layerplan.plan.policies import make_plan
from tests.qwen3 import TINY_QWEN3, build_tiny_qwen3
from tests.tiny_tokenizer import make_bytes, save_tokenizer

FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "boundary": (
        {"type": "freeze_deep", "boundary": 3},
        r"plan\.boundary=3: must lie in 1\.\.2 for a model of 3 layers",
    ),
    "k": ({"type": "random", "k": 4}, r"plan\.k=4: must lie in 1\.\.3"),
    "layer": ({"type": "explicit", "trainable": [7]}, "layer 7 does not exist; the nearest is model.layers.2"),
    "k of a trace": ({"type": "top_k_sensitivity", "k": 3}, r"plan\.k=3: must lie in 1\.\.2"),
    "layer of a trace": ({"type": "explicit", "trainable": [7, "top:1:sensitivity"]}, "layer 7 does not exist"),
    "k of a measurement": ({"type": "fisher", "k": 4}, r"plan\.k=4: must lie in 1\.\.3"),
    "module": ({"type": "from_profile", "modules": ["mpl"]}, "'mpl' matches no module of a layer; the nearest is mlp"),
    "phase": (
        {
            "type": "schedule",
            "phases": [
                {"steps": 2, "plan": {"type": "from_profile"}},
                {"plan": {"type": "freeze_shallow", "boundary": 9}},
            ],
        },
        r"plan\.boundary=9: must lie in 1\.\.2",
    ),
    "file": ({"type": "file", "path": "/nope/freeze_plan.json"}, "/nope/freeze_plan.json: cannot be read"),
}


def make_config(folder: Path, plan: dict[str, Any], model: dict[str, Any] | None = None) -> RunConfig:
    corpus = {"seq_len": 64, "sources": [{"path": str(folder / "text.txt")}]}
    values = {"name": "run", "storage_path": str(folder / "runs"), "corpus": corpus, "plan": plan}
    return RunConfig.model_validate(values | {"model": model or {"type": "pretrained", "name": str(folder / "model")}})


def save_qwen3(folder: Path, **changes: Any) -> ModelRef:
    changes = {"vocab_size": 257, "eos_token_id": 256} | changes
    save_tokenizer(folder, make_bytes(), control=("<eos>",), config=TINY_QWEN3 | changes)
    save_model(build_tiny_qwen3(**changes), str(folder / "model.safetensors"))
    return ModelRef(str(folder))


def save_plan(path: Path, model: ModelRef) -> dict[str, Any]:
    make_plan(FreezeDeepPlanConfig(boundary=1), model=model.identity(), shape=model.shape()).save(path)
    return {"type": "file", "path": str(path)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a model of three layers and a text."""
    (tmp_path / "text.txt").write_text("a text", encoding="utf-8")
    save_qwen3(tmp_path / "model")
    return tmp_path


@pytest.mark.parametrize("name", FAULTS)
def test_what_no_measurement_can_mend_is_refused_before_there_is_a_run(name: str, folder: Path) -> None:
    """So that the name stays free: nothing is written that a corrected plan would contradict."""
    plan, words = FAULTS[name]
    config = make_config(folder, plan)
    for run in (check_plan, continue_pretraining, print_dry_run):
        with pytest.raises(PlanError, match=words):
            run(config)
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    "plan",
    [
        {"type": "explicit", "trainable": ["top:1:sensitivity"]},
        {"type": "top_k_sensitivity", "k": 2},
        {"type": "budget", "max_flops_share": 0.5},
        {"type": "fisher", "k": 3},
        {"type": "schedule", "phases": [{"steps": 2, "plan": {"type": "from_profile"}}, {"plan": {"type": "full"}}]},
        {"type": "rotation", "k": 3, "period_steps": 500},
        {"type": "recommended", "prefer": "balanced"},
    ],
    ids=lambda plan: plan["type"],
)
def test_a_plan_that_fits_waits_for_its_measurement(plan: dict[str, Any], folder: Path) -> None:
    check_plan(make_config(folder, plan))


def test_a_plan_file_of_another_model_is_refused_with_both_values(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(folder, save_plan(folder / "plan.json", save_qwen3(folder / "other", num_hidden_layers=5)))
    words = "made for num_layers=5, the model at hand has num_layers=3"
    for run in (check_plan, continue_pretraining, print_dry_run):
        with pytest.raises(PlanError, match=words):
            run(config)
    assert "FLOPs" not in capsys.readouterr().out


def test_a_plan_file_of_the_same_weights_in_another_folder_is_taken(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ModelRef(str(folder / "model"))
    plan = save_plan(folder / "plan.json", model)
    (folder / "model").rename(folder / "moved")
    config = make_config(folder, plan, {"type": "pretrained", "name": str(folder / "moved")})
    check_plan(config)
    print_dry_run(config)
    assert "plan   freeze_deep: " in capsys.readouterr().out


def test_a_run_that_has_its_plan_does_not_look_for_the_file_again(folder: Path) -> None:
    config = make_config(folder, {"type": "file", "path": str(folder / "gone.json")})
    save_plan(locate_run_folder(config).plan, ModelRef(str(folder / "model")))
    check_plan(config)
    check_plan_of_made(config, ModelRef(str(folder / "model")))


def test_a_base_that_is_not_made_yet_is_known_by_its_depth(folder: Path) -> None:
    """Its weights are compared once they are there, before the corpus is built."""
    scratch = {"type": "scratch", "num_layers": 3}
    with pytest.raises(PlanError, match=r"plan\.boundary=3: must lie in 1\.\.2"):
        check_plan(make_config(folder, {"type": "freeze_deep", "boundary": 3}, scratch))
    deep = save_plan(folder / "deep.json", save_qwen3(folder / "deep", num_hidden_layers=5))
    with pytest.raises(PlanError, match="made for num_layers=5, the model at hand has num_layers=3"):
        check_plan(make_config(folder, deep, scratch))
    config = make_config(folder, save_plan(folder / "plan.json", ModelRef(str(folder / "model"))), scratch)
    check_plan(config)
    check_plan_of_made(config, ModelRef(str(folder / "model")))
    with pytest.raises(PlanError, match="made for name='model', the model at hand has name='other'"):
        check_plan_of_made(config, save_qwen3(folder / "other", initializer_range=0.1))
