"""The plain way to measure layers: one full forward pass per masked layer, one probe at a time, hooks only.

Written from DESIGN.md's formulas with numpy and the model's own `forward`; it shares no code with `layerplan.tracer`.
It is the oracle of the fast paths and their peer in `benchmarks/tracer.py`.
"""

from __future__ import annotations

import numpy as np


def run_intact(model, layers, ids_BT):
    """Logits (B, V) of the model, and its residual stream at the last position around every block, L + 1 of (B, D)."""
    states = []

    def keep_input(module, args, kwargs):
        states.append((args[0] if args else kwargs["hidden_states"])[:, -1])

    def keep_output(module, args, output):
        states.append((output[0] if isinstance(output, tuple) else output)[:, -1])

    handles = [layers[0].register_forward_pre_hook(keep_input, with_kwargs=True)]
    handles += [layer.register_forward_hook(keep_output) for layer in layers]
    logits = model(input_ids=ids_BT, use_cache=False).logits[:, -1]
    for handle in handles:
        handle.remove()
    return logits, states


def run_masked(model, layers, ids_BT, context_BT, after_block, mask):
    """Logits (B, V) when the context is zeroed, or set to its mean, after block `after_block` (0: the first input)."""

    def change(hidden):
        hidden = hidden.clone()
        for row, context in enumerate(context_BT):
            value = hidden[row, context].mean(0) if mask == "mean" else 0.0
            hidden[row, context] = value
        return hidden

    def before(module, args, kwargs):
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    handle = layers[after_block].register_forward_pre_hook(before, with_kwargs=True)
    logits = model(input_ids=ids_BT, use_cache=False).logits[:, -1]
    handle.remove()
    return logits


def jensen_shannon(logits, perturbed, top_k):
    """JS divergence of two logit vectors on the union of their top-k sets, renormalised; numpy, float64."""
    p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (np.float64(logits), np.float64(perturbed)))
    support = np.arange(len(p))
    if top_k:
        support = np.union1d(np.argsort(-p, kind="stable")[:top_k], np.argsort(-q, kind="stable")[:top_k])
    p, q = p[support] / p[support].sum(), q[support] / q[support].sum()
    middle = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = [np.where(x > 0, x * np.log(x / middle), 0.0).sum() for x in (p, q)]
    return sum(parts) / 2


def trace_naively(model, layers, ids_BT, context_BT, mask, top_k):
    """JS(l), l = 0..L-1, of a batch: (B, L)."""
    intact, _ = run_intact(model, layers, ids_BT)
    rows = []
    for after_block in range(len(layers)):
        perturbed = run_masked(model, layers, ids_BT, context_BT, after_block, mask)
        rows.append([jensen_shannon(p.numpy(), q.numpy(), top_k) for p, q in zip(intact.float(), perturbed.float())])
    return np.array(rows).T
