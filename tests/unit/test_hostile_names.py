"""A name or a path in somebody's file does nothing but stand there: not in a page, not on the disk."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from eval.items import load_benchmark
from layerplan.checkpoint.export_report import ExportReport
from layerplan.checkpoint.model_card import render_model_card
from layerplan.config.evaluation import BenchmarkConfig
from layerplan.config.plan import ExplicitPlanConfig
from layerplan.errors import CheckpointError, EvaluationError, ModelError
from layerplan.inside import leads_inside
from layerplan.models.weight_files import read_index
from layerplan.plan.explain import explain_plan
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_plan
from layerplan.report.page import write_report
from layerplan.run_folder import PLAN_NAME, RESULT_NAME
from layerplan.train.request import load_result
from tests.layer_profiles import make_profile

HOSTILE = "</p><script>x()</script>'\"&`](y)|\n$\\frac{<img src=x onerror=x()>"
BUILTIN = Path("eval/data/builtin").resolve()


class Elements(HTMLParser):
    """What a browser would make of a page: the names of its elements and of their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names |= {tag, *(name for name, _ in attrs)}

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def model() -> ModelIdentity:
    return ModelIdentity(name=HOSTILE, revision=HOSTILE, model_type="qwen3", num_layers=3)


@pytest.fixture(scope="module")
def plan(model: ModelIdentity) -> FreezePlan:
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
    }
    sizes |= {"num_hidden_layers": 3, "vocab_size": 32, "max_position_embeddings": 64}
    shape = ModelShape.from_hf_config(sizes | {"model_type": "qwen3", "tie_word_embeddings": False})
    return make_plan(ExplicitPlanConfig(trainable=[0]), model=model, shape=shape)


def test_no_name_of_any_artifact_becomes_an_element_of_the_page(
    tmp_path: Path, model: ModelIdentity, plan: FreezePlan
) -> None:
    run = tmp_path / HOSTILE.replace("/", " ").replace("\n", " ")
    run.mkdir()
    plan.save(run / PLAN_NAME)
    fields = {"groups": [HOSTILE], "answered_share": {HOSTILE: 1.0}}
    make_profile(model, [1.0, 2.0, 3.0], [3.0, 2.0], **fields).save(run / "layer_profile.json")
    verdict = dict.fromkeys(("reference_accuracy", "accuracy", "difference", "adjusted_p", "num_questions"), 1.0)
    verdict |= dict.fromkeys(("benchmark", "protocol", "sentence"), HOSTILE)
    verdict |= {"reference_interval": [0, 1], "accuracy_interval": [0, 1]}
    (run / "verdicts.json").write_text(json.dumps([verdict]))
    (run / "export.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    (run / "resolved_config.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    (run / "token_store").mkdir()
    (run / "token_store" / "manifest.json").write_text(
        json.dumps({"counts": {HOSTILE: 1}, "num_rows": 1, "num_tokens": 1})
    )
    for label in ("base", "step_00000001"):
        folder = run / "evaluation" / label
        folder.mkdir(parents=True)
        continuation = json.dumps({"prompt": HOSTILE, "text": HOSTILE})
        (folder / "continuations.jsonl").write_text(continuation + "\n")
        (folder / "scores.json").write_text(
            json.dumps({HOSTILE: {"question_mean": 1.0, "num_correct": 1, "num_asked": 1}})
        )
    numbers = {"base": 1.0, "trained": 1.0, "difference_interval": [0, 1], "adjusted_p": 1.0}
    held_out = json.dumps([numbers | {"name": HOSTILE, "sentence": HOSTILE}])
    (run / "evaluation" / "held_out_verdicts.json").write_text(held_out)
    seen = Elements(write_report(run).read_text(encoding="utf-8"))
    assert not seen.names & {"script", "img", "onerror"}
    assert seen.text.count("<script>") > 10, "each name is there, as text"


def test_a_name_in_a_markdown_page_is_one_line_of_text(model: ModelIdentity, plan: FreezePlan) -> None:
    report = ExportReport(Path(), 1, 1, 1, ("float32",), 0.0)
    for page in (explain_plan(plan), render_model_card(plan, step=1, state={}, report=report)):
        text = re.sub(r"\A---\n.*?\n---\n", "", page, flags=re.DOTALL)  # the front matter is JSON, value by value
        outside_code = "".join(text.split("`")[::2])
        assert "<script>" not in outside_code and "](y)" not in outside_code and "\n$" not in page


@pytest.mark.parametrize("path", ["../x", "/x", "a/../../x", "", ".", "a//b", "a\\..\\x", "a\0b", 3, None])
def test_a_path_that_leads_elsewhere_is_none_of_the_folder(path: object) -> None:
    assert not leads_inside(path)
    assert leads_inside("x") and leads_inside("folder/..x/x.safetensors")


def test_a_subject_outside_the_benchmark_is_refused(tmp_path: Path) -> None:
    shutil.copytree(BUILTIN, tmp_path / "set")
    source = next((tmp_path / "set" / "val").glob("*.csv"))
    shutil.copy(source, tmp_path / "outside.csv")
    subjects = json.loads((tmp_path / "set" / "subjects.json").read_text(encoding="utf-8"))
    subjects["../../outside"] = next(iter(subjects.values()))
    (tmp_path / "set" / "subjects.json").write_text(json.dumps(subjects), encoding="utf-8")
    with pytest.raises(EvaluationError, match=r"subject '\.\./\.\./outside' is no name of a file in"):
        load_benchmark(BenchmarkConfig(name="ceval", path=str(tmp_path / "set")))


def test_an_index_of_weights_names_no_file_outside_the_model(tmp_path: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../other/model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"names '\.\./other/model\.safetensors'; a file of this folder is expected"):
        read_index(tmp_path)


def test_a_result_names_no_model_outside_its_run(tmp_path: Path) -> None:
    numbers = ("final_step", "tokens_seen", "skipped_steps", "rollbacks", "first_loss", "final_loss", "train_s")
    values = dict.fromkeys((*numbers, "wall_s", "tokens_per_s", "mfu"), 1) | {"validation_loss": None, "proof": {}}
    values |= {"final_checkpoint": "checkpoints/step_00000001", "stopped_early": False, "hf_dir": "../other/hf"}
    (tmp_path / RESULT_NAME).write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="hf_dir leads out of the run folder"):
        load_result(tmp_path)
    (tmp_path / RESULT_NAME).write_text(json.dumps(values | {"hf_dir": "hf/step_00000001"}))
    assert load_result(tmp_path) is not None
