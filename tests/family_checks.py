"""One family through everything a run does with a model, each answer compared with transformers' own.

A stage says `exact`, by which remedy it is exact, or `refused: ` and the words the user reads. `WRONG: ` is what no family
may say: an answer was given and is not the oracle's. An error of no class of ours is raised, and is a fault.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from layerplan.checkpoint.dcp import save_checkpoint
from layerplan.checkpoint.hf_export import export_hf
from layerplan.config.plan import FreezeDeepPlanConfig, FreezeShallowPlanConfig, FullPlanConfig
from layerplan.config.train import OptimizerConfig
from layerplan.corpus.rows import make_rows
from layerplan.errors import LayerplanError
from layerplan.models.causal_lm import load_causal_lm
from layerplan.models.files import identify_model
from layerplan.models.freezing import apply_plan, check_gradient_coverage
from layerplan.models.model_sizes import load_model_shape
from layerplan.models.ref import ModelRef
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.loss_recipe import LossRecipe
from layerplan.plan.model_shape import ModelShape
from layerplan.plan.policies import make_plan
from layerplan.tracer.model_runner import LayerRunner
from layerplan.train import block_attention
from layerplan.train.loss_proof import find_blocks_fault
from layerplan.train.optim import build_optimizer
from layerplan.train.self_test import ask_model
from layerplan.train.step import LossModel, make_batches
from tests import families, family_oracle

TOLERANCE = 1e-4
ALONE = 2
"""What one parameter may differ more than all of them: float32 rounds otherwise on every kind of CPU."""
"""Of a loss, relative to it; of a gradient, relative to its norm or a thousandth of the largest one's."""
PLANS = {
    "full": FullPlanConfig(),
    "freeze_deep": FreezeDeepPlanConfig(boundary=2),
    "freeze_shallow": FreezeShallowPlanConfig(boundary=2),
}


@dataclass
class FamilyReport:
    """What each stage said; empty where an earlier refusal leaves nothing to ask."""

    model_type: str
    class_name: str
    load: str = ""
    lens: str = ""
    loss: str = ""
    plans: str = ""
    cost: str = ""
    export: str = ""

    @property
    def answers(self) -> list[str]:
        """The stages' answers, in order."""
        return [getattr(self, each.name) for each in fields(self)[2:]]

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self), ensure_ascii=False)


@dataclass
class Family:
    """A saved tiny model and what is known of it so far."""

    folder: Path
    model: nn.Module
    documents: list[Tensor]
    gradients: dict[str, Tensor] = field(default_factory=dict)
    recipe: LossRecipe | None = None
    shape: ModelShape | None = None
    plan_kind: str | None = None


def check_family(model_type: str, folder: Path) -> FamilyReport:
    """Takes a model type through load, lens, loss, cost, plans and export, below an empty folder."""
    report = FamilyReport(model_type, families.class_name(model_type))
    base = folder / "base"
    report.load, model = _load(model_type, base)
    if model is None:
        return report
    family = Family(base, model, family_oracle.make_documents())
    report.lens = _ask(_check_lens, family)
    report.loss = _ask(_check_loss, family)
    report.cost = _ask(_check_cost, family)
    if family.recipe is not None and family.shape is not None:
        report.plans = _ask(_check_plans, family)
    if family.plan_kind is not None:
        report.export = _ask(_check_export, family)
    return report


def _ask(stage: Callable[[Family], str], family: Family) -> str:
    try:
        return stage(family)
    except LayerplanError as error:
        return _refusal(error, family.folder)


def _refusal(error: LayerplanError, folder: Path) -> str:
    """The words, without the folder and the plan's hash of this test."""
    words = re.sub(r"freeze plan [0-9a-f]{12}: ", "", str(error))
    return "refused: " + words.replace(f"model.name={folder}: ", "").replace(str(folder), "the model")


def _load(model_type: str, base: Path) -> tuple[str, nn.Module | None]:
    made = _save(model_type, base)
    try:
        model = load_causal_lm(str(base))
    except LayerplanError as error:
        return _refusal(error, base), None
    if made is None:
        return "WRONG: loaded, though transformers cannot build it", None
    expected = dict(made.named_parameters())
    differing = [name for name, value in model.named_parameters() if not torch.equal(value, expected[name])]
    return (f"WRONG: {differing[0]} differs from what was saved" if differing else "exact"), model


def _save(model_type: str, base: Path) -> nn.Module | None:
    """Saves the model, or its config alone beside one stray tensor when transformers cannot build it."""
    try:
        model: Any = families.make_model(model_type)
    except (ImportError, AttributeError):
        families.make_config(model_type).save_pretrained(base)
        save_file({"weight": torch.zeros(1)}, base / "model.safetensors", metadata={"format": "pt"})
        return None
    model.save_pretrained(base)
    families.make_config(model_type).save_pretrained(base)  # the whole one, where the class keeps its text part alone
    return model


@torch.no_grad()
def _check_lens(family: Family) -> str:
    runner = LayerRunner(family.model)
    ids = family.documents[0]
    runner.check_lens(ids)
    normed: list[Tensor] = []
    handle = runner.parts.final_norm.register_forward_pre_hook(lambda module, args: normed.append(args[0]))
    own = family_oracle.run_alone(family.model, ids).logits[:, -1].float()
    handle.remove()
    final = runner.run(ids)[-1]
    if normed and not torch.equal(normed[-1], final):
        return f"WRONG: {runner.parts.final_norm_path} is not what follows the last layer"
    error = float((runner.lens(final[:, -1]) - own).abs().max())
    return "exact" if error <= TOLERANCE * max(1.0, float(own.abs().max())) else f"WRONG: off by {error:.2g}"


def _check_loss(family: Family) -> str:
    report = ask_model(family.model, seq_len=sum(family_oracle.LENGTHS))
    found = _backward(family, report.recipe)
    chosen = getattr(family.model.config, "_attn_implementation", None)
    gradients = {name: value.grad for name, value in family.model.named_parameters() if value.grad is not None}
    family.model.zero_grad(set_to_none=True)
    family_oracle.use_eager(family.model)
    with torch.no_grad():
        expected = float(family_oracle.compute_loss(family.model, family.documents))
    family.gradients = family_oracle.compute_gradients(family.model, family.documents)
    leak = family_oracle.measure_leak(family.model, family.documents[1])
    if chosen is not None:
        family.model.set_attn_implementation(chosen)
    if leak > TOLERANCE:
        return f"WRONG: a later token moves logits by {leak:.2g}"
    if abs(found - expected) > TOLERANCE * abs(expected):
        return f"WRONG: a loss of {found:.6g}, the documents alone give {expected:.6g}"
    family.recipe = report.recipe
    return _compare(gradients, family.gradients) or _check_blocks(family, expected) or _name_remedy(report.recipe)


def _check_blocks(family: Family, expected: float) -> str:
    """What is wrong with attention in blocks of four queries, where the model may be given any attention, or nothing."""
    assert family.recipe is not None
    if family.recipe.attention != "any":
        return ""
    if find_blocks_fault(ModelRef(str(family.folder)).skeleton().model, family.recipe) is not None:
        return ""
    before = getattr(family.model.config, "_attn_implementation", None)
    family.model.set_attn_implementation(block_attention.BLOCKS)
    try:
        with mock.patch.object(block_attention, "BLOCK_TOKENS", 4):
            found = _backward(family, family.recipe)
        gradients = {name: value.grad for name, value in family.model.named_parameters() if value.grad is not None}
    finally:
        family.model.zero_grad(set_to_none=True)
        if before is not None:
            family.model.set_attn_implementation(before)
    if abs(found - expected) > TOLERANCE * abs(expected):
        return f"WRONG: a loss of {found:.6g} in blocks, the documents alone give {expected:.6g}"
    return _compare(gradients, family.gradients).replace("WRONG:", "WRONG: in blocks,")


def _backward(family: Family, recipe: LossRecipe) -> float:
    """Runs the training step's own loss over the documents in one packed row, forward and backward."""
    starts = np.cumsum([0, *family_oracle.LENGTHS[:-1]]).astype(np.int32)
    ids = torch.cat(family.documents, dim=1).numpy().astype(np.int32)
    rows = make_rows(np.arange(1), ids, [starts], np.array([ids.shape[1]], dtype=np.int32))
    model, total = LossModel(family.model, recipe), 0.0
    for batch in make_batches(rows, 2, recipe, torch.device("cpu")):
        loss = model(batch)
        loss.backward()
        total += float(loss.detach())
    return total


def _compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """What is wrong with gradients, or nothing."""
    if set(found) != set(expected):
        return f"WRONG: the gradients of {sorted(set(found) ^ set(expected))[:3]} are there or not"
    floor = 1e-3 * max(float(value.norm()) for value in expected.values())
    gaps = {name: float((found[name] - value).norm()) for name, value in expected.items()}
    norms = {name: float(value.norm()) for name, value in expected.items()}
    total = math.hypot(*gaps.values()) / math.hypot(*norms.values())
    if total > TOLERANCE:
        return f"WRONG: the gradient of all parameters differs by {total:.2g} of its norm"
    for name, gap in gaps.items():
        if gap > ALONE * TOLERANCE * max(norms[name], floor):
            return f"WRONG: the gradient of {name} differs by {gap / max(norms[name], floor):.2g} of its norm"
    return ""


def _name_remedy(recipe: LossRecipe) -> str:
    remedies = []
    if recipe.rows == "reset":
        remedies.append("starts of documents given")
    if recipe.rows == "alone":
        remedies.append("one document per row")
    if recipe.attention == "eager":
        remedies.append("plain attention")
    if recipe.head.kind == "own":
        remedies.append("its own head")
    return "exact" + (f", by {' and '.join(remedies)}" if remedies else "")


def _check_cost(family: Family) -> str:
    shape = load_model_shape(str(family.folder))
    wanted = sum(parameter.numel() for parameter in family.model.parameters())
    if shape.total_params != wanted:
        return f"WRONG: {shape.total_params} parameters, the model has {wanted}"
    family.shape = shape
    return "exact" if shape.is_exact else "parameters exact, work estimated"


def _make_plan(family: Family, kind: str) -> FreezePlan:
    assert family.shape is not None, "asked after the cost"
    return make_plan(PLANS[kind], model=identify_model(str(family.folder)), shape=family.shape)


def _check_plans(family: Family) -> str:
    answers = {kind: _ask(lambda family, kind=kind: _check_plan(family, kind), family) for kind in PLANS}
    family.plan_kind = next((kind for kind in ("freeze_deep", "full") if answers[kind].startswith("exact")), None)
    if any(answer.startswith("WRONG") for answer in answers.values()):
        return next(answer for answer in answers.values() if answer.startswith("WRONG"))
    refused = [kind for kind, answer in answers.items() if answer.startswith("refused")]
    if not refused:
        return answers["full"]
    return f"{answers['full']} under full, {answers[refused[0]]}" if refused[0] != "full" else answers["full"]


def _check_plan(family: Family, kind: str) -> str:
    assert family.recipe is not None, "asked after the loss"
    applied = apply_plan(family.model, _make_plan(family, kind))
    family.model.zero_grad(set_to_none=True)
    _backward(family, family.recipe)
    check_gradient_coverage(family.model, applied)
    expected = {name: value for name, value in family.gradients.items() if name in applied.trainable}
    if kind == "full":
        expected = family.gradients
    found = {name: value.grad for name, value in family.model.named_parameters() if value.grad is not None}
    wrong = _compare(found, expected)
    if wrong:
        return f"{wrong} under {kind}"
    return "exact" + (f", {len(applied.idle)} tensors that text does not reach stay frozen" if applied.idle else "")


def _check_export(family: Family) -> str:
    assert family.plan_kind is not None, "asked after the plans"
    plan = _make_plan(family, family.plan_kind)
    applied = apply_plan(family.model, plan)
    assert family.recipe is not None, "asked after the loss"
    family.model.zero_grad(set_to_none=True)
    _backward(family, family.recipe)
    optimizer = build_optimizer(family.model, OptimizerConfig(learning_rate=0.01), masters={}, compiled=False)
    optimizer.step(grad_scale=torch.ones(()))
    checkpoint, out = family.folder.parent / "checkpoint", family.folder.parent / "hf"
    save_checkpoint(checkpoint, family.model, optimizer, None)
    export_hf(base=ModelRef(str(family.folder)), checkpoint=checkpoint, out_dir=out, plan=plan)
    base, exported = (dict(load_causal_lm(str(each)).named_parameters()) for each in (family.folder, out))
    for name, value in family.model.named_parameters():
        if not torch.equal(exported[name], value):
            return f"WRONG: {name} is not what was trained"
        if name not in applied.trainable and not torch.equal(exported[name], base[name]):
            return f"WRONG: {name} is frozen and moved"
    moved = sum(not torch.equal(exported[name], base[name]) for name in applied.trainable)
    return "exact" if moved else "WRONG: nothing moved"
