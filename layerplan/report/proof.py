"""The page's table of what was checked of the plan, with what each number is compared with and its bound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from layerplan.plan.loss_recipe import LOSS_BOUNDS
from layerplan.report.answers import read_json
from layerplan.report.html_parts import render_table
from layerplan.run_folder import RunFolder
from layerplan.train.compute_dtype import MeasuredDtype

_DIFFERENCE = "self_test_difference"
_LABELS = {
    "trainable_with_gradient": "tensors that train and have a gradient",
    "frozen_without": "frozen tensors without a gradient",
    "coverage_checks": "times gradients were compared with the plan",
    "loss_recipe": "how the loss is computed, found by asking the model",
    "self_tests": "times the placed model was asked",
    "frozen_checksum": "checksum of the frozen tensors in training",
    "frozen_checks": "times they were found unchanged",
    "frozen_check_share_of_training": "share of training time that took",
    "frozen_tensors_identical_to_base": "exported tensors identical to the base, byte for byte",
    "trained_tensors": "exported tensors that trained",
    "trained_tensors_changed": "of those, changed",
    "trained_tensors_dtype": "dtype they are written in",
    "logits_moved_by_rounding": "largest change of a logit by rounding to it, as a share of the largest logit",
}
_HASH_CHARS = 28


def render_proof(run: RunFolder) -> str:
    """HTML of the section; empty for a run that proved nothing yet."""
    proof = {**read_json(run.training).get("proof", {}), **read_json(run.export)}
    if not proof:
        return ""
    asked = read_json(run.self_test)
    rows = []
    for name, value in proof.items():
        if name == _DIFFERENCE:
            rows += _describe_losses(value, asked, _find_dtype(run))
        else:
            rows.append([_LABELS.get(name, name.replace("_", " ")), _show(name, value)])
    return "<h2>Proof that the plan was obeyed</h2>" + render_table(["checked", ""], rows)


def _describe_losses(difference: float, asked: Mapping[str, Any], dtype: str | None) -> list[list[str]]:
    """Rows on the loss of packed rows beside that of the same documents one by one: before placing, and as it trained.

    Args:
        difference: The largest found on the placed model, nats per token.
        asked: The report of the self-test; empty when there is none.
        dtype: What products were computed in; None when the run does not say.
    """
    rows, alone = [], asked.get("loss_alone")
    if alone and "loss" in asked:
        apart = abs(asked["loss"] - alone)
        rows.append(["loss as trained, beside documents one by one, in float32", _compare(apart, alone, "float32")])
    where = f", in {dtype}" if dtype is not None else ""
    rows.append([f"the same on the workers' placed model{where}, at most", _compare(difference, alone, dtype)])
    return rows


def _compare(apart: float, loss: float | None, dtype: str | None) -> str:
    text = f"{apart:.3g} nats per token apart" + (f", {_show_share(apart / loss)} of the loss" if loss else "")
    bound = LOSS_BOUNDS.get(dtype or "")
    if bound is None:
        return text
    return f"{text}; up to {_show_share(bound)} is {dtype}'s rounding, more would have ended the run"


def _show_share(share: float) -> str:
    return f"{share:.1%}" if share >= 1e-3 else f"{share:.0e}"


def _find_dtype(run: RunFolder) -> str | None:
    train = read_json(run.config).get("train", {})
    dtype: str | None = train.get("compute_dtype")
    if dtype != "auto":
        return dtype
    if train.get("use_gpu"):
        return "bfloat16"
    return MeasuredDtype.load(run.compute_dtype).dtype if run.compute_dtype.exists() else None


def _show(name: str, value: Any) -> str:
    if name.endswith("_share_of_training") or name == "logits_moved_by_rounding":
        return f"{value:.3%}"
    return str(value) if name != "frozen_checksum" else f"{value[:_HASH_CHARS]}..."
