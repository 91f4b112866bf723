"""The command `layerplan` and the module `layerplan`: help at once, small things without a config, clear errors."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_model
from transformers import AutoTokenizer

import layerplan
from layerplan.cli import COMMANDS, main
from layerplan.config.plan import FreezeDeepPlanConfig, FreezeShallowPlanConfig
from layerplan.models.model_sizes import load_model_shape
from layerplan.plan.layer_profile import ModelIdentity
from tests.qwen3 import QWEN3_0P6B, QWEN3_0P6B_IDENTITY, TINY_QWEN3, build_tiny_qwen3
from tests.tiny_tokenizer import make_bytes, save_tokenizer

ROOT = Path(__file__).resolve().parents[2]
ENGINES = ("torch", "ray", "transformers", "vllm", "mlflow", "datasets", "pandas", "numpy", "pydantic")


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A published shape without weights, which is all that plans and prices need."""
    (tmp_path / "Qwen3-0.6B").mkdir()
    (tmp_path / "Qwen3-0.6B" / "config.json").write_text(json.dumps(QWEN3_0P6B), encoding="utf-8")
    return str(tmp_path / "Qwen3-0.6B")


def run_python(code: str) -> str:
    return subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).strip()


def test_importing_layerplan_and_asking_for_help_imports_no_engine() -> None:
    names = f"[name for name in {ENGINES!r} if name in sys.modules]"
    assert run_python(f"import sys, layerplan; print({names})") == "[]"
    code = f"import sys; from layerplan.cli import build_parser; build_parser('').format_help(); print({names})"
    assert run_python(code) == "[]"


@pytest.mark.parametrize("name", layerplan.__all__)
def test_every_offered_name_is_there_and_is_documented(name: str) -> None:
    offered = getattr(layerplan, name)
    assert isinstance(offered, str) or offered.__doc__
    assert name in dir(layerplan)


def test_a_name_that_is_not_offered_is_an_error_that_lists_those_that_are() -> None:
    with pytest.raises(
        AttributeError, match="has no attribute 'train_model'; it offers FreezePlan, LayerProfile, ModelRef, RunConfig"
    ):
        layerplan.train_model  # noqa: B018


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and shown.startswith(f"usage: layerplan {command} ")
    assert COMMANDS[command][1][1:20] in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trace"], "error: MODEL: a folder or hub id is required, or --config FILE"),
        (["trace", "a", "--config", "b"], "error: MODEL: not beside --config"),
        (["evaluate", "m", "--benchmarks", "ceval", "mmlu", "--dry-run"], "error: evaluation.benchmarks.1.name:"),
        (["run", "--config", "nowhere.yaml"], "error: --config nowhere.yaml: cannot be read"),
        (["plan", "price", "m", "--seq-len", "0"], "error: --seq-len 0: must be at least 1"),
        (["report", "nowhere"], "is no run folder (no resolved_config.json)"),
    ],
)
def test_what_is_missing_is_one_line_and_exit_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


def test_a_trace_needs_no_config_file(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", model, "--set", "trace.probes_per_group=3", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert '"name": "Qwen3-0.6B"' in shown and '"probes_per_group": 3' in shown
    assert "28 layers, 596,049,920 parameters" in shown  # the published size of Qwen3-0.6B


def test_plans_are_shown_compared_and_priced(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    identity, shape = QWEN3_0P6B_IDENTITY, load_model_shape(model)
    for name, config in (("deep", FreezeDeepPlanConfig(boundary=7)), ("shallow", FreezeShallowPlanConfig(boundary=14))):
        layerplan.make_plan(config, model=identity, shape=shape).save(tmp_path / name / "freeze_plan.json")
    deep, shallow = str(tmp_path / "deep"), str(tmp_path / "shallow" / "freeze_plan.json")
    assert main(["plan", "show", deep]) == 0
    assert "freeze_deep" in capsys.readouterr().out
    assert main(["plan", "diff", deep, shallow]) == 0
    shown = capsys.readouterr().out
    assert f"only {deep} trains layers 0-6" in shown and f"only {shallow} trains layers 14-27" in shown
    assert main(["plan", "price", model, "--plan", deep, "--seq-len", "1024"]) == 0
    shown = capsys.readouterr().out
    assert "rows of 1,024 tokens" in shown and "freeze_deep 1/2" in shown
    assert f"freeze_deep {layerplan.FreezePlan.load(Path(deep) / 'freeze_plan.json').sha256[:8]}" in shown


def test_a_text_is_continued_as_a_plain_loop_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    files = {"config": TINY_QWEN3 | {"vocab_size": 257, "eos_token_id": 256}}
    save_tokenizer(folder, make_bytes(), control=("<eos>",), **files)
    model = build_tiny_qwen3(vocab_size=257)
    save_model(model, str(folder / "model.safetensors"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("Hello").input_ids
    for _ in range(6):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert main(["generate", str(folder), "Hello", "--tokens", "6"]) == 0
    said = capsys.readouterr().out
    assert said == f"{folder}\n    {tokenizer.decode(ids[5:], skip_special_tokens=True)!r}\n\n"
    assert main(["generate", str(folder), "Hello", "--chat"]) == 1
    assert "its tokenizer has no chat template; leave --chat out" in capsys.readouterr().err


def test_the_examples_of_the_api_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    build_tiny_qwen3().save_pretrained(tmp_path / "model")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, {"MODEL": str(tmp_path / "model"), "FOLDER": tmp_path})  # what a reader would paste
    assert layerplan.FreezePlan.load(tmp_path / "freeze_plan.json").trainable_layers == (0,)


def test_plans_for_other_depths_are_not_compared(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = QWEN3_0P6B | {"num_hidden_layers": 8}
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text(json.dumps(values), encoding="utf-8")
    for folder in (model, str(tmp_path / "small")):
        shape = load_model_shape(folder)
        identity = ModelIdentity(name="Qwen3", model_type="qwen3", num_layers=shape.num_layers)
        plan = layerplan.make_plan(FreezeDeepPlanConfig(boundary=2), model=identity, shape=shape)
        plan.save(Path(folder) / "freeze_plan.json")
    assert main(["plan", "diff", model, str(tmp_path / "small")]) == 1
    assert "plans for 28 and 8 layers" in capsys.readouterr().err
    assert main(["plan", "price", model, "--plan", str(tmp_path / "small")]) == 1
    assert "made for 8 layers" in capsys.readouterr().err
