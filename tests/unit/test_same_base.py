"""A folder of a model may be another model tomorrow: what was made with the one is not taken for the other's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eval.engine import EngineAnswer, EngineSpec
from eval.pool import Ledger
from layerplan.models.ref import ModelRef
from tests.model_folders import edit_config, edit_weights, save_tiny_base


def double_the_norm(tensors: dict[str, Any]) -> None:
    tensors["model.norm.weight"] = 2 * tensors["model.norm.weight"]


@pytest.fixture
def base(tmp_path: Path) -> ModelRef:
    return ModelRef(str(save_tiny_base(tmp_path / "base")))


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
