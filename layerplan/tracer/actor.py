"""A tracer replica: loads the model once and measures batches of probes, mapped over them by Ray Data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerplan.config.trace import TraceConfig
from layerplan.errors import ProbeError
from layerplan.models.causal_lm import load_causal_lm, load_tokenizer
from layerplan.tracer import measures
from layerplan.tracer.model_runner import LayerRunner


class TracerActor:
    """Maps probe rows (`id, group, prompt, answer, context_end`) to measurement rows."""

    def __init__(self, model_name: str, revision: str, trust_remote_code: bool, config: TraceConfig) -> None:
        self._config = config
        self._device = torch.device("cuda" if torch.cuda.is_available() and config.num_gpus_per_actor > 0 else "cpu")
        model = load_causal_lm(model_name, revision=revision, trust_remote_code=trust_remote_code)
        self._runner = LayerRunner(model.to(self._device))
        self._tokenizer = load_tokenizer(model_name, revision=revision, trust_remote_code=trust_remote_code)
        self._max_tokens = getattr(model.config, "max_position_embeddings", None)
        self._checked = False

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Measures a batch; every output column has one entry per probe."""
        ids, mask, context = self._encode(batch)
        if not self._checked:
            self._runner.check_lens(ids, mask)
            self._checked = True
        states_LBD = self._runner.run(ids, mask)
        logits_LBV = torch.stack([self._runner.lens(state) for state in states_LBD])
        target_B = logits_LBV[-1].argmax(-1)
        log_prob_LB = torch.log_softmax(logits_LBV.double(), -1).gather(
            -1, target_B.expand(len(logits_LBV), -1)[..., None]
        )[..., 0]
        gold_B = torch.tensor([self._first_token(str(answer)) for answer in batch["answer"]], device=self._device)
        ratio = measures.compute_task_particle(log_prob_LB.exp(), self._config.ratio_denominator)
        js = self._trace_masks(ids, mask, context, logits_LBV[-1])
        return {
            "id": batch["id"],
            "group": batch["group"],
            "is_right": (target_B == gold_B).cpu().numpy(),
            "task_particle": _rows(ratio),
            "log_change": _rows(measures.compute_log_change(log_prob_LB)),
            **{name: _rows(values) for name, values in js.items()},
            **self._deviations(states_LBD, gold_B),
        }

    def _trace_masks(self, ids: Tensor, mask: Tensor, context: Tensor, intact: Tensor) -> dict[str, Tensor]:
        """JS(l), l = 0..L, for the configured mask and support and the two variants behind the stability evidence."""
        other = "mean" if self._config.mask == "zero" else "zero"
        runs = {
            "js": (self._config.mask, self._config.js_top_k),
            "js_top_k_check": (self._config.mask, self._config.js_top_k_check),
            "js_mask_check": (other, self._config.js_top_k),
        }
        collected: dict[str, list[Tensor]] = {name: [] for name in runs}
        for after_block in range(self._runner.num_layers):
            perturbed = {
                kind: self._runner.lens(self._runner.run_masked(ids, mask, context, after_block, kind))
                for kind in ("zero", "mean")
            }
            for name, (kind, top_k) in runs.items():
                collected[name].append(measures.compute_js(intact, perturbed[kind], top_k))
        zero = torch.zeros_like(collected["js"][0])
        return {name: torch.stack([*values, zero]) for name, values in collected.items()}

    def _deviations(self, states_LBD: Tensor, gold_B: Tensor) -> dict[str, Any]:
        weight_VD = self._runner.parts.lm_head.weight
        basis_BD = measures.compute_output_basis(weight_VD, gold_B)
        last = len(states_LBD) - 1
        rows: dict[str, list[Tensor]] = {"cosine": [], "ce": [], "rank": []}
        for index, state in enumerate(states_LBD):
            norms = self._config.deviation_norm
            normed = norms == "all" or (norms == "hf" and index == last)
            values = self._runner.parts.final_norm(state) if normed else state
            for name, value in measures.compute_semantic_deviations(values, basis_BD, weight_VD, gold_B).items():
                rows[name].append(value)
        return {f"deviation_{name}": _rows(torch.stack(values)) for name, values in rows.items()}

    def _encode(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Left-padded ids, attention mask, and the context's positions, each (B, T)."""
        encoded = [
            self._encode_one(str(identifier), str(prompt), int(end))
            for identifier, prompt, end in zip(batch["id"], batch["prompt"], batch["context_end"])
        ]
        width = max(len(ids) for ids, _ in encoded)
        shape = (len(encoded), width)
        ids_BT, mask_BT, context_BT = (np.zeros(shape, dtype=np.int64) for _ in range(3))
        for row, (ids, context) in enumerate(encoded):
            ids_BT[row, width - len(ids) :] = ids
            mask_BT[row, width - len(ids) :] = 1
            context_BT[row, width - len(ids) :] = context
        to = self._device
        return (
            torch.from_numpy(ids_BT).to(to),
            torch.from_numpy(mask_BT).to(to),
            torch.from_numpy(context_BT).bool().to(to),
        )

    def _encode_one(self, identifier: str, prompt: str, context_end: int) -> tuple[list[int], list[bool]]:
        encoding = self._tokenizer(prompt, return_offsets_mapping=True)
        context = [is_in_context(prompt, start, end, context_end) for start, end in encoding["offset_mapping"]]
        if not any(context):
            raise ProbeError(f"probe {identifier}: no token lies in its context")
        if context[-1]:
            raise ProbeError(f"probe {identifier}: no token lies in its query")
        ids: list[int] = encoding["input_ids"]
        if self._max_tokens is not None and len(ids) > self._max_tokens:
            raise ProbeError(f"probe {identifier}: has {len(ids)} tokens, the model {self._max_tokens} positions")
        return ids, context

    def _first_token(self, answer: str) -> int:
        ids: Sequence[int] = self._tokenizer(answer, add_special_tokens=False)["input_ids"]
        return ids[0] if ids else -1


def is_in_context(prompt: str, start: int, end: int, context_end: int) -> bool:
    """Whether a token's span, stripped of white space, is non-empty and ends at or before the query begins."""
    span = prompt[start:end]
    stripped = span.rstrip()
    return bool(span.strip()) and start + len(stripped) <= context_end


def _rows(values_LB: Tensor) -> list[Any]:
    return list(values_LB.T.cpu().numpy())
