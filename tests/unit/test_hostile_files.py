"""Garbage in place of a file of ours ends in one line of ours that names the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerplan.config.load import load_config
from layerplan.corpus.manifest import Manifest
from layerplan.errors import LayerplanError
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_profile import LayerProfile
from layerplan.run_folder import MANIFEST_NAME, PLAN_NAME, RESULT_NAME
from layerplan.train.request import load_result
from tests.garbage import GARBAGE


@pytest.mark.parametrize(
    ("name", "read"),
    [
        (PLAN_NAME, FreezePlan.load),
        ("layer_profile.json", LayerProfile.load),
        (MANIFEST_NAME, lambda path: Manifest.load(path.parent)),
        (RESULT_NAME, lambda path: load_result(path.parent)),
        ("run.yaml", lambda path: load_config(path, [])),
        ("run.json", lambda path: load_config(path, [])),
    ],
)
def test_garbage_is_refused_in_our_own_words(tmp_path: Path, name: str, read: Callable[[Path], Any]) -> None:
    for kind, content in GARBAGE.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(LayerplanError) as raised:
            read(tmp_path / name)
        message = str(raised.value)
        assert "pydantic" not in message and "Traceback" not in message and len(message) < 2000, kind
        if not name.startswith("run."):
            assert name in message and "\n" not in message, kind
