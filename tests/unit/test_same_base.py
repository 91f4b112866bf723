"""A folder of a model may be another model tomorrow: what was made with the one is not taken for the other's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

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
