"""Every diagnostic of a batch of probes from one intact pass and one perturbed pass per mask.

Shapes: B probes, T tokens, D hidden, V vocabulary, L layers. Only `last` goes through the head, a few rows at a time,
since a row of float32 logits over 150,000 words is as large as the rest of the measurement.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layerplan.config.trace import TraceConfig
from layerplan.models.semantic_bases import SemanticBases
from layerplan.tracer import measures
from layerplan.tracer.deviations import measure_deviations
from layerplan.tracer.encode import EncodedProbe
from layerplan.tracer.masking import Mask, Way, choose_way, is_masked_up_to_query, trace_masked
from layerplan.tracer.model_runner import LayerRunner

MAX_COPIED_TOKENS = 16_384
"""Tokens of all perturbed copies together, which bound the memory of a pass."""
HEAD_ROWS = 128
"""Rows that go through the head at once."""

Record = dict[str, Any]


class ProbeMeter:
    """Measures encoded probes of one length with one model."""

    def __init__(self, runner: LayerRunner, config: TraceConfig) -> None:
        self.runner = runner
        self._config = config
        self._bases = SemanticBases(runner.parts.lm_head.weight)
        self._ways: dict[tuple[Mask, bool], Way] = {}
        self._is_checked = False
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """Wall time by what was computed, of all that this meter measured."""

    @torch.no_grad()
    def measure(self, probes: Sequence[EncodedProbe]) -> list[Record]:
        """One record per probe, in order.

        A record holds `log_prob` of the model's own answer, `js` for the configured mask and support with its two
        variants, the deviations by kind (L + 1 values each), the answers' ids, whether the model's own answer stands in
        the context, the entropy of its distribution in nats, and the ways it was measured. A probe that does not check the
        other mask has NaN for it, and no way.

        Raises:
            ModelError: When the model fails its self-test.
        """
        length = len(probes[0].input_ids)
        at_once = max(1, MAX_COPIED_TOKENS // (self.runner.num_layers * length))
        parts = [probes[start : start + at_once] for start in range(0, len(probes), at_once)]
        return [record for part in parts for record in self._measure(part)]

    def _measure(self, probes: Sequence[EncodedProbe]) -> list[Record]:
        device = self.runner.device
        ids_BT = torch.tensor([probe.input_ids for probe in probes], device=device)
        context_BT = torch.tensor([probe.is_context for probe in probes], device=device)
        gold_B = torch.tensor([probe.gold_id for probe in probes], device=device)
        if not self._is_checked:
            with self._timing("self-tests"):
                self.runner.check_lens(ids_BT)
            self._is_checked = True
        with self._timing("intact pass"):
            states_LBTD = self.runner.run(ids_BT)
        last_LBD = states_LBTD[:, :, -1]
        with self._timing("log P"):
            intact_BV = self.runner.lens(last_LBD[-1])
            target_B = intact_BV.argmax(-1)
            log_prob_LB = self.compute_log_prob(last_LBD, target_B)
        other: Mask = "mean" if self._config.mask == "zero" else "zero"
        own_way, own_js = self._trace(ids_BT, context_BT, states_LBTD, intact_BV, self._config.mask)
        checked = [row for row, probe in enumerate(probes) if probe.checks_mask]
        other_way, other_js = "", torch.full_like(own_js[0], torch.nan)
        if checked:
            parts = ids_BT[checked], context_BT[checked], states_LBTD[:, checked], intact_BV[checked]
            other_way, (other_js[:, checked],) = self._trace(*parts, other)
        with self._timing("deviations"):
            deviations = measure_deviations(self.runner, self._bases, last_LBD, gold_B, self._config.deviation_norm)
        columns = {
            "log_prob": log_prob_LB,
            "js": own_js[0],
            "js_top_k_check": own_js[1],
            "js_mask_check": other_js,
            **{f"deviation_{kind}": values for kind, values in deviations.items()},
        }
        values = {name: column.T.double().cpu().numpy() for name, column in columns.items()}
        is_right = (target_B == gold_B).tolist()
        is_copy = ((ids_BT == target_B[:, None]) & context_BT).any(-1).tolist()
        entropy = torch.cat([measures.compute_entropy(rows) for rows in intact_BV.split(HEAD_ROWS)]).tolist()
        return [
            {
                "id": probe.id,
                "group": probe.group,
                "num_tokens": len(probe.input_ids),
                "target_id": target,
                "gold_id": probe.gold_id,
                "is_right": is_right[row],
                "is_copy": is_copy[row],
                "entropy": entropy[row],
                f"way_{self._config.mask}": own_way,
                f"way_{other}": other_way if probe.checks_mask else "",
                **{name: np.ascontiguousarray(column[row]) for name, column in values.items()},
            }
            for row, (probe, target) in enumerate(zip(probes, target_B.tolist()))
        ]

    def compute_log_prob(self, last_LBD: Tensor, target_B: Tensor) -> Tensor:
        """Log P(l) of the targets, l = 0..L, float64: (L + 1, B)."""
        targets = target_B.expand(len(last_LBD), -1)
        rows = [measures.compute_log_prob(logits, chosen) for logits, chosen in self._iter_logits(last_LBD, targets)]
        return torch.cat(rows).reshape(targets.shape)

    def compute_js(self, final_LBD: Tensor, intact_BV: Tensor, top_ks: Sequence[int]) -> list[Tensor]:
        """JS(l), l = 0..L, one (L + 1, B) for each support; JS(L) is exactly 0."""
        num_layers, num_probes = final_LBD.shape[:2]
        row_of = torch.arange(num_probes, device=final_LBD.device).expand(num_layers, -1)
        found: list[list[Tensor]] = [[] for _ in top_ks]
        for logits, rows in self._iter_logits(final_LBD, row_of):
            for values, top_k in zip(found, top_ks):
                values.append(measures.compute_js(intact_BV[rows], logits, top_k))
        end = torch.zeros(1, num_probes, dtype=torch.float64, device=final_LBD.device)
        return [torch.cat([torch.cat(values).reshape(num_layers, num_probes), end]) for values in found]

    def find_way(self, mask: Mask, ids_BT: Tensor, context_BT: Tensor, states_LBTD: Tensor) -> Way:
        """The way of carrying copies that the self-test chose for batches like this one."""
        key = (mask, is_masked_up_to_query(context_BT))
        if key not in self._ways:
            self._ways[key] = choose_way(self.runner, ids_BT, states_LBTD, context_BT, mask)
        return self._ways[key]

    def _trace(
        self, ids_BT: Tensor, context_BT: Tensor, states_LBTD: Tensor, intact_BV: Tensor, mask: Mask
    ) -> tuple[Way, list[Tensor]]:
        """The way taken, and JS(l), l = 0..L, on the configured support and, for the configured mask, on its check's."""
        with self._timing("self-tests"):
            way = self.find_way(mask, ids_BT, context_BT, states_LBTD)
        with self._timing(f"{mask} mask"):
            final = trace_masked(self.runner, ids_BT, states_LBTD, context_BT, mask, way)
        supports = [self._config.js_top_k, self._config.js_top_k_check]
        with self._timing("JS"):
            return way, self.compute_js(final, intact_BV, supports if mask == self._config.mask else supports[:1])

    @contextmanager
    def _timing(self, part: str) -> Iterator[None]:
        """Adds what is done inside to a part's time; a GPU is waited for, which passes as large as these do not feel."""
        started = time.perf_counter()
        yield
        if self.runner.device.type == "cuda":
            torch.cuda.synchronize(self.runner.device)
        self.seconds[part] += time.perf_counter() - started

    def _iter_logits(self, states_LBD: Tensor, tags_LB: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits of the flattened rows, `HEAD_ROWS` at a time, with the tag of each row."""
        flat, tags = states_LBD.flatten(0, 1), tags_LB.flatten()
        for start in range(0, len(flat), HEAD_ROWS):
            yield self.runner.lens(flat[start : start + HEAD_ROWS]), tags[start : start + HEAD_ROWS]
