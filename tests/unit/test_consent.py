"""Consent to a model's own code is given once, in the config, and reaches every place where that code would run."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eval.engine import EngineSpec
from eval.held_out_scoring import HeldOutActor
from eval.open_engine import open_engine
from layerplan.cli import main
from layerplan.config.run import RunConfig
from layerplan.config.trace import TraceConfig
from layerplan.errors import ModelError
from layerplan.models.ref import ModelRef
from layerplan.pipeline.model_options import find_base, find_named
from layerplan.tracer.actor import SECONDS, TracerActor, encode_batch
from layerplan.tracer.encode import EncodedProbe
from layerplan.train.asking import read_recipe
from layerplan.train.loss_proof import ask_by_name
from tests.model_folders import give_code, save_tiny_base
from tests.tiny_corpus import make_byte_tokenizer

REFUSED = r"modeling_tidal\.TidalForCausalLM\), which is not run unless asked; .*model\.trust_remote_code: true"


def make_config(tmp_path: Path, **model: object) -> RunConfig:
    values = {"name": "tides", "storage_path": str(tmp_path / "runs"), "model": {"type": "pretrained", **model}}
    return RunConfig.model_validate(values)


def test_consent_holds_for_the_model_and_the_runs_own_exports_and_no_other(tmp_path: Path) -> None:
    exported = tmp_path / "runs" / "tides" / "hf" / "step_00000004"
    asked = make_config(tmp_path, name="owner/base", revision="v2", trust_remote_code=True)
    assert find_base(asked) == find_named("owner/base", asked) == ModelRef("owner/base", "v2", True)
    assert find_named(str(exported), asked) == ModelRef(str(exported), trust_remote_code=True)
    for other in ("owner/other", str(tmp_path / "runs" / "tides_2" / "hf")):
        assert find_named(other, asked) == ModelRef(other)
    assert not find_named(str(exported), make_config(tmp_path, name="owner/base")).trust_remote_code


def test_the_engine_and_the_held_out_scores_run_the_code_when_allowed(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path, vocab_size=300)
    make_byte_tokenizer(base)
    spec = EngineSpec(ModelRef(str(base)), "transformers", "float32", 0, (5, 6, 7, 8), 32)
    plain = open_engine(spec).ask([[1, 2, 3]], [4])[0]
    nats = HeldOutActor(ModelRef(str(base)), "float32", 0).compute_nats([1, 2, 3])
    give_code(base)
    with pytest.raises(ModelError, match=REFUSED):
        open_engine(spec)
    with pytest.raises(ModelError, match=REFUSED):
        HeldOutActor(ModelRef(str(base)), "float32", 0)
    trusted = ModelRef(str(base), trust_remote_code=True)
    coded = open_engine(replace(spec, model=trusted)).ask([[1, 2, 3]], [4])[0]
    assert (coded.letter_logprobs, coded.token_ids) == (plain.letter_logprobs, plain.token_ids)
    assert HeldOutActor(trusted, "float32", 0).compute_nats([1, 2, 3]) == nats


def test_the_tracer_and_the_self_test_run_the_code_when_allowed(tmp_path: Path) -> None:
    """The same weights without the code are the oracle."""
    base = save_tiny_base(tmp_path, vocab_size=300)
    make_byte_tokenizer(base)
    rows = {"probes": [encode_batch([EncodedProbe("p", "tides", (1, 2, 3, 4), (True, True, False, False), 5)])]}
    plain = TracerActor(ModelRef(str(base)), TraceConfig())(rows)
    recipe = read_recipe(_report(ModelRef(str(base))))
    trusted = ModelRef(str(give_code(base)), trust_remote_code=True)
    with pytest.raises(ModelError, match=REFUSED):
        TracerActor(ModelRef(str(base)), TraceConfig())
    traced = TracerActor(trusted, TraceConfig())(rows)
    assert traced.pop(SECONDS) and plain.pop(SECONDS)
    assert {name: np.asarray(each).tolist() for name, each in traced.items()} == {
        name: np.asarray(each).tolist() for name, each in plain.items()
    }
    assert read_recipe(_report(trusted)) == recipe


def test_plans_are_priced_and_carried_to_other_tools_for_a_model_of_its_own_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same commands on the same model without its code are the oracle."""
    base = save_tiny_base(tmp_path, vocab_size=300)
    make_byte_tokenizer(base)
    rule, plan = tmp_path / "axolotl.yaml", tmp_path / "plan.json"
    rule.write_text("unfrozen_parameters: [^model.layers.0.]\n", encoding="utf-8")
    commands = [
        ["import", str(rule), "--from", "axolotl", "--model", str(base), "--out", str(plan)],
        ["export", str(plan), "--to", "axolotl", "--model", str(base)],
        ["price", str(base), "--plan", str(plan)],
    ]
    plain = [_run(command, capsys) for command in commands]
    assert all(code == 0 for code, _ in plain)
    give_code(base)
    for command, (_, said) in zip(commands, plain, strict=True):
        code, error = _run(command, capsys)
        assert code == 1 and re.search(REFUSED, error)
        assert _run([*command, "--trust-remote-code"], capsys) == (0, said)


def _run(command: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code, and what was answered or said; without the plan's hash, which names the kind of model."""
    code = main(["plan", *command])
    out, error = capsys.readouterr()
    return code, re.sub(r"\b[0-9a-f]{8,12}\b", "", out) or error


def _report(model: ModelRef) -> dict[str, object]:
    report = ask_by_name(model, seq_len=8)
    assert report is not None
    return report.to_json()
