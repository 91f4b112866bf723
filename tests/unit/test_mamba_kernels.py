"""Which code scans Mamba2 layers: what the config says, whatever is installed; tests/gpu has what the kernels compute."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

from layerplan.config.run import RunConfig
from layerplan.config.train import TrainConfig
from layerplan.errors import ModelError, TrainingError
from layerplan.models.hybrid import mamba_kernels
from layerplan.models.hybrid.mamba_kernels import scan, step
from layerplan.pipeline.checks import check_model
from layerplan.train.build import check_mamba_kernels, choose_mamba_kernels
from tests.hybrids import build_hybrid
from tests.qwen3 import build_tiny_qwen3

ROOT = Path(__file__).resolve().parents[2]
SCAN = "def mamba_chunk_scan_combined(*inputs, **options):\n    raise RuntimeError('mamba-ssm was called')\n"
TRAIN = """
import torch
from tests.hybrids import build_hybrid
model = build_hybrid().train()
ids = torch.arange(1, 31)[None]
model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
try:
    model.model.layers[0].mixer_block.mixer.__class__.__base__.forward(
        model.model.layers[0].mixer_block.mixer.eval(), torch.randn(1, 30, 32))
except RuntimeError as error:
    print(error)
"""


def install(folder: Path, first_line: str) -> Path:
    """A package by mamba-ssm's name and paths, whose scan fails; `first_line` is what importing it does."""
    triton = folder / "mamba_ssm" / "ops" / "triton"
    triton.mkdir(parents=True)
    (folder / "mamba_ssm" / "__init__.py").write_text(first_line)
    (triton.parent / "__init__.py").write_text("")
    (triton / "__init__.py").write_text("")
    (triton / "ssd_combined.py").write_text(SCAN)
    return folder


def test_an_installed_mamba_ssm_is_not_called_unless_asked_for(tmp_path: Path) -> None:
    """Transformers' own mixer calls it, on a CPU too, as the last line shows."""
    site = install(tmp_path, "")
    done = subprocess.run(
        [sys.executable, "-c", TRAIN], env={"PYTHONPATH": f"{ROOT}:{site}", "OMP_NUM_THREADS": "1"},
        text=True, capture_output=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.strip() == "mamba-ssm was called", done.stderr[-2000:]


def test_the_scan_is_found_behind_a_package_that_asks_for_its_cuda_extension(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(install(tmp_path, "import selective_scan_cuda\n"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "mamba_ssm"]:
        monkeypatch.delitem(sys.modules, name)
    load = mamba_kernels._load_scan.__wrapped__
    with pytest.raises(RuntimeError, match="mamba-ssm was called"):
        load()()
    assert "mamba_ssm" not in sys.modules
    for name in [name for name in sys.modules if name.startswith("mamba_ssm.")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.skipif(find_spec("mamba_ssm") is not None, reason="mamba-ssm is installed here")
def test_missing_kernels_are_an_error_before_anything_is_looked_at(tmp_path: Path) -> None:
    values = {"name": "run", "model": {"type": "pretrained", "name": str(tmp_path / "no such model")}, "corpus": {}}
    train = {"mamba_kernels": "triton", "use_gpu": True}
    with pytest.raises(ModelError) as error:
        check_model(RunConfig.model_validate(values | {"plan": {"type": "full"}, "train": train}))
    assert str(error.value) == (
        "train.mamba_kernels=triton: needs mamba-ssm, which is not installed here; MAMBA_SKIP_CUDA_BUILD=TRUE"
        " MAMBA_FORCE_BUILD=TRUE pip install --no-build-isolation --no-deps mamba-ssm einops"
    )


def test_kernels_need_a_gpu_and_a_model_with_mamba2_layers() -> None:
    with pytest.raises(ValidationError, match="mamba_kernels=triton needs use_gpu=true"):
        TrainConfig(mamba_kernels="triton")
    with pytest.raises(TrainingError, match="mamba_kernels=triton: mamba-ssm's kernels run on GPUs, not on a cpu"):
        check_mamba_kernels("triton", torch.device("cpu"))
    with pytest.raises(TrainingError, match="mamba_kernels=triton: the model has no Mamba2 layers of a hybrid"):
        choose_mamba_kernels(build_tiny_qwen3(), "triton")
    hybrid = build_hybrid()
    choose_mamba_kernels(hybrid, "triton")
    assert [layer.mixer_block.mixer.kernels for layer in hybrid.model.layers[:2]] == ["triton"] * 2


@torch.no_grad()
def test_our_mixer_is_transformers_own_bit_for_bit_where_its_time_steps_are_not_bounded() -> None:
    hybrid = build_hybrid()
    ours = hybrid.model.layers[0].mixer_block.mixer
    theirs = NemotronHMamba2Mixer(ours.config, 0).eval()
    theirs.load_state_dict(ours.state_dict())
    theirs.time_step_limit = (0.0, float("inf"))
    states = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 50)
    mask[0, :9] = 0
    for options in ({}, {"attention_mask": mask}):
        assert torch.equal(ours(states, **options), theirs(states, **options))


def test_one_step_is_the_scan_of_one_position() -> None:
    torch.manual_seed(0)
    inputs, steps, A = torch.randn(2, 1, 4, 6), torch.randn(2, 1, 4), -torch.rand(4)
    B, C, D, state = torch.randn(2, 1, 2, 5), torch.randn(2, 1, 2, 5), torch.randn(4), torch.randn(2, 4, 6, 5)
    bias = torch.zeros(4)
    wanted, after = scan(
        "torch", inputs, steps, A, B, C, D_H=D, step_bias_H=bias, chunk_size=8, state_BHPN=state, gives_state=True
    )
    sizes = torch.nn.functional.softplus(steps[:, 0])
    found, state = step(inputs[:, 0], sizes, A, B[:, 0], C[:, 0], D, state)
    torch.testing.assert_close(found, wanted[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(state, after, rtol=0, atol=1e-5)
