"""Deviations of a model's states from the labels that follow its prompts (SALF, section 3.1), for all layers at once."""

from __future__ import annotations

import torch
from torch import Tensor

from layerplan.models.semantic_bases import SemanticBases
from layerplan.tracer import measures
from layerplan.tracer.model_runner import LayerRunner

STATES_AT_ONCE = 128
"""States whose similarity to the whole vocabulary is held at once."""


def measure_deviations(
    runner: LayerRunner, bases: SemanticBases, last_LBD: Tensor, label_B: Tensor, norm: str
) -> dict[str, Tensor]:
    """Deviations by kind, (L + 1, B) each.

    Args:
        runner: The model.
        bases: Of its head.
        last_LBD: States of each prompt's last position around every block.
        label_B: Token that follows each prompt.
        norm: As `TraceConfig.deviation_norm`. Where the head reads another width than the layers pass on, no state can be
            compared as it is, and every one passes what leads to the head.
    """
    states = last_LBD
    if last_LBD.shape[-1] != runner.parts.lm_head.weight.shape[-1]:
        states = torch.stack([runner.lead_to_head(state) for state in last_LBD])
    elif norm == "all":
        states = runner.parts.final_norm(last_LBD)
    elif norm == "hf":
        states = torch.cat([last_LBD[:-1], runner.parts.final_norm(last_LBD[-1:])])
    flat, shape = states.flatten(0, 1), states.shape[:2]
    labels = label_B.repeat(shape[0])
    found = [
        measures.compute_deviations(bases, state, label)
        for state, label in zip(flat.split(STATES_AT_ONCE), labels.split(STATES_AT_ONCE))
    ]
    return {kind: torch.cat([part[kind] for part in found]).reshape(shape) for kind in measures.DEVIATIONS}
