"""Consent to a model's own code is given once, in the config, and reaches every place where that code would run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from eval.engine import EngineSpec, open_engine
from eval.held_out_scoring import HeldOutActor
from layerplan.config.run import RunConfig
from layerplan.errors import ModelError
from layerplan.pipeline.model_options import trusts_remote_code
from tests.model_folders import give_code, save_tiny_base
from tests.tiny_corpus import make_byte_tokenizer

REFUSED = r"modeling_tidal\.TidalForCausalLM\), which is not run unless asked; .*model\.trust_remote_code: true"


def make_config(tmp_path: Path, **model: object) -> RunConfig:
    values = {"name": "tides", "storage_path": str(tmp_path / "runs"), "model": {"type": "pretrained", **model}}
    return RunConfig.model_validate(values)


def test_consent_holds_for_the_model_and_the_runs_own_exports_and_no_other(tmp_path: Path) -> None:
    exported = tmp_path / "runs" / "tides" / "hf" / "step_00000004"
    asked = make_config(tmp_path, name="owner/base", trust_remote_code=True)
    assert trusts_remote_code(asked)
    assert trusts_remote_code(asked, "owner/base")
    assert trusts_remote_code(asked, str(exported))
    assert not trusts_remote_code(asked, "owner/other")
    assert not trusts_remote_code(asked, str(tmp_path / "runs" / "tides_2" / "hf"))
    assert not trusts_remote_code(make_config(tmp_path, name="owner/base"), str(exported))


def test_the_engine_and_the_held_out_scores_run_the_code_when_allowed(tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path, vocab_size=300)
    make_byte_tokenizer(base)
    spec = EngineSpec(str(base), "main", "transformers", "float32", 0, (5, 6, 7, 8), 32)
    plain = open_engine(spec).ask([[1, 2, 3]], [4])[0]
    nats = HeldOutActor(str(base), "main", "float32", 0).compute_nats([1, 2, 3])
    give_code(base)
    with pytest.raises(ModelError, match=REFUSED):
        open_engine(spec)
    with pytest.raises(ModelError, match=REFUSED):
        HeldOutActor(str(base), "main", "float32", 0)
    coded = open_engine(replace(spec, trust_remote_code=True)).ask([[1, 2, 3]], [4])[0]
    assert (coded.letter_logprobs, coded.token_ids) == (plain.letter_logprobs, plain.token_ids)
    assert HeldOutActor(str(base), "main", "float32", 0, True).compute_nats([1, 2, 3]) == nats
