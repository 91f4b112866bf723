"""Checkpoints of a few kilobytes, saved and sealed as a worker does it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from layerplan.checkpoint.dcp import load_checkpoint, save_checkpoint
from layerplan.run_folder import SEAL_NAME, STATE_NAME, name_step
from layerplan.train.checkpoint_writer import seal_checkpoint
from layerplan.train.state import TrainState

RUN_ID = "0123456789abcdef" * 2
FRESH = TrainState(plan_sha256="plan", corpus_sha256="corpus")


def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Two weights after one step of AdamW."""
    torch.manual_seed(seed)
    model = nn.Linear(8, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(3, 8)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def save(folder: Path, step: int, *, run_id: str = RUN_ID, plan: str = "plan") -> Path:
    """A sealed checkpoint whose values are drawn by its step."""
    path = folder / name_step(step)
    model, optimizer = build(step)
    saving = save_checkpoint(path, model, optimizer, None)
    saving.wait()
    state = FRESH.model_copy(update={"step": step, "plan_sha256": plan, "last_loss": 1.5})
    seal_checkpoint(path, state, saving, run_id)
    return path


def load(path: Path) -> list[Tensor]:
    """What a checkpoint holds: weights, then both moments of each."""
    model, optimizer = build(999)
    load_checkpoint(path, model, optimizer)
    moments = [optimizer.state[value][key] for value in model.parameters() for key in ("exp_avg", "exp_avg_sq")]
    return [value.detach().clone() for value in (*model.parameters(), *moments)]


def make_old(path: Path) -> None:
    """Takes away what checkpoints did not have before there were seals."""
    (path / SEAL_NAME).unlink()
    state = json.loads((path / STATE_NAME).read_text())
    del state["checkpoint_format"]
    (path / STATE_NAME).write_text(json.dumps(state))
