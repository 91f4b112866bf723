"""Probes as token ids with their context positions, and batches of one length.

Spans come from the tokenizer's character offsets, so nothing here depends on how a tokenizer writes white space:
byte-level BPE puts it in front of a word, SentencePiece as a meta symbol, WordPiece drops it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from layerplan.errors import ProbeError
from layerplan.tracer.probes import Probe


@dataclass(frozen=True)
class EncodedProbe:
    """What the model needs of a probe; `input_ids` and `is_context` have one entry per token."""

    id: str
    group: str
    input_ids: tuple[int, ...]
    is_context: tuple[bool, ...]
    gold_id: int
    """First token of the right answer, as it follows the prompt."""
    checks_mask: bool = True
    """Whether it is measured with the other mask too."""


def encode_probes(
    probes: Sequence[Probe], tokenizer: Any, max_tokens: int | None = None, *, mask_check_every: int = 1
) -> list[EncodedProbe]:
    """Tokenizes probes with the special tokens the model is used to, except those after the prompt.

    Args:
        probes: Probes with distinct ids.
        tokenizer: A fast tokenizer from transformers.
        max_tokens: Positions the model has, None when it has no limit.
        mask_check_every: Of each group, the first probe and every so many-th after it check the other mask.

    Raises:
        ProbeError: Naming the probe whose context, query or answer covers no token, or that is too long.
    """
    seen: Counter[str] = Counter()
    encoded = []
    for probe in probes:
        checks_mask = seen[probe.group] % mask_check_every == 0
        encoded.append(replace(_encode(probe, tokenizer, max_tokens), checks_mask=checks_mask))
        seen[probe.group] += 1
    return encoded


def make_batches(encoded: Sequence[EncodedProbe], batch_size: int) -> list[list[EncodedProbe]]:
    """Cuts probes into batches of one length, so that none is padded; a function of the probes alone, not their order.

    Within a length, probes of equal context length stand together: fewer rows are left to compute for each.
    """
    ordered = sorted(encoded, key=lambda probe: (len(probe.input_ids), sum(probe.is_context), probe.id))
    batches = []
    for _, members in groupby(ordered, key=lambda probe: len(probe.input_ids)):
        same = list(members)
        batches += [same[start : start + batch_size] for start in range(0, len(same), batch_size)]
    return batches


def is_in_context(prompt: str, start: int, end: int, context_end: int) -> bool:
    """Whether a token's span, stripped of white space, is non-empty and ends at or before the query begins."""
    span = prompt[start:end]
    return bool(span.strip()) and start + len(span.rstrip()) <= context_end


def _encode(probe: Probe, tokenizer: Any, max_tokens: int | None) -> EncodedProbe:
    encoding = tokenizer(probe.prompt, return_offsets_mapping=True)
    spans = list(encoding["offset_mapping"])
    length = len(spans)
    while length and spans[length - 1][0] == spans[length - 1][1]:
        # an end-of-sequence token a template appends: the answer follows the prompt, not this
        length -= 1
    ids, spans = encoding["input_ids"][:length], spans[:length]
    is_context = [is_in_context(probe.prompt, start, end, probe.context_end) for start, end in spans]
    if not any(is_context):
        raise ProbeError(f"probe {probe.id}: no token lies in its context")
    is_text = [bool(probe.prompt[start:end].strip()) for start, end in spans]
    if is_context[-1] or not any(text and not inside for text, inside in zip(is_text, is_context)):
        raise ProbeError(f"probe {probe.id}: no token lies in its query")
    if max_tokens is not None and len(ids) > max_tokens:
        raise ProbeError(f"probe {probe.id}: has {len(ids)} tokens, the model {max_tokens} positions")
    return EncodedProbe(probe.id, probe.group, tuple(ids), tuple(is_context), _find_gold_id(probe, tokenizer))


def _find_gold_id(probe: Probe, tokenizer: Any) -> int:
    """The token that begins where the prompt ends; of the answer alone when a token spans both."""
    whole = tokenizer(probe.prompt + probe.answer, return_offsets_mapping=True)
    for token, (start, end) in zip(whole["input_ids"], whole["offset_mapping"]):
        if end > len(probe.prompt):
            if start >= len(probe.prompt):
                return int(token)
            break
    alone = tokenizer(probe.answer, add_special_tokens=False)["input_ids"]
    if not alone:
        raise ProbeError(f"probe {probe.id}: its answer {probe.answer!r} has no token")
    return int(alone[0])
