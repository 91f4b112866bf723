"""The part of the page that shows what the tracer measured, and whether another choice would have changed it."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from layerplan.plan.boundary_choice import BoundaryChoice, choose_boundary
from layerplan.plan.describe import (
    PAIR_HEADINGS,
    describe_certainty,
    describe_measurement,
    describe_sensitivities,
    get_answered_share,
    list_pairs,
)
from layerplan.plan.explain import read_choice
from layerplan.plan.freeze_plan import FreezePlan
from layerplan.plan.layer_profile import LayerProfile
from layerplan.report.figures import Deviations
from layerplan.report.html_parts import embed_svg, render_table
from layerplan.run_folder import PROBES_NAME

INTRODUCTION = (
    "Before training, the base answered short probes: a context, then a question about it. At every layer two things were"
    " measured. The task particle (TP) says how much the layer moves the probability of the answer. The layer sensitivity"
    " (LS) says how far the effect of hiding the context changes when it is hidden behind the layer instead of before it."
    " The paper expects sensitive layers below and task particles above; S(k) says how well a boundary k between layers"
    " k - 1 and k tells the two sides apart."
)
SHOWN_DEVIATIONS = ("cosine", "ce")
CAPTIONS = {
    "profiles": "Normalised profiles (the paper's Figure 10): where task evidence moves, and where a masked context"
    " still matters; bands are 95 % bootstrap intervals over probes.",
    "alignment_score": "Alignment score (Eq. 7) with relative and with absolute sensitivity, the one in use with its"
    " interval over probes; shaded: where the boundary may lie; bars: share of resamples of the probes that choose it, which"
    " is stability and no evidence.",
    "task_particle": "Task particle by probe group (Figure 4, top row).",
    "layer_sensitivity": "Layer sensitivity by probe group (Figure 4, bottom row).",
    "semantic": "SALF, another method: mean deviation from the right answer after each layer, and the layer up to which it would"
    " freeze (dashed).",
    "deviations": "The same deviations probe by probe (SALF, Figure 5); bars are means.",
}
CHECKS = {
    "top_k": "another support of the divergence (top-50 for top-10)",
    "mask": "another mask (mean for zero, or zero for mean)",
    "halves": "half of the probes against the other half, mean of 100 random halvings",
}


def read_deviations(run_dir: Path) -> dict[str, Deviations]:
    """SALF deviations per probe by kind, (N, L + 1); empty when the run kept no per-probe values."""
    path = run_dir / PROBES_NAME
    if not path.exists():
        return {}
    table = pq.read_table(path, columns=[f"deviation_{kind}" for kind in SHOWN_DEVIATIONS])
    return {kind: np.array(table[f"deviation_{kind}"].to_pylist()) for kind in SHOWN_DEVIATIONS}


def render_measurement(
    profile: LayerProfile | None, figures: Mapping[str, Figure], plan: FreezePlan | None = None
) -> str:
    """HTML of the measurement: sentences, figures, both sensitivities, answers by group, stability.

    Args:
        profile: The measurement; None gives an empty text.
        figures: Figures by name.
        plan: Names the rule; the default one when left out.
    """
    if profile is None:
        return ""
    choice = read_choice(plan) or choose_boundary(profile)
    text = f'<h2>What was measured of the layers</h2><p class="soft">{INTRODUCTION}</p>'
    details = _list_sentences([*describe_measurement(profile), *describe_certainty(profile, choice)])
    text += f"<p>{_sum_up(profile, choice)}</p><details><summary>In detail, as the run logged it</summary>{details}</details>"
    for name, caption in CAPTIONS.items():
        if name in figures:
            text += f'<figure>{embed_svg(figures[name])}<figcaption class="soft">{html.escape(caption)}</figcaption></figure>'
    text += f"<h2>Relative and absolute sensitivity</h2><p>{html.escape(' '.join(describe_sensitivities(profile)))}</p>"
    text += render_table(PAIR_HEADINGS, list_pairs(profile, choice.min_side))
    text += "<h2>What the probes were answered</h2>" + _answer_table(profile)
    return text + "<h2>How stable the measurement is</h2>" + _stability_table(profile)


def _sum_up(profile: LayerProfile, choice: BoundaryChoice) -> str:
    """Two sentences for who reads no further: how well the probes were answered, and whether a boundary is supported."""
    best = choice.best_boundary
    found = "No boundary between shallow and deep layers stands out"
    if choice.is_supported:
        found = f"Layers below {best} differ from those from {best} on"
    if best is not None:
        found += f" (the best is {best}; layers in other orders do as well with p = {choice.p_value:.2g})"
    return f"The model answered {get_answered_share(profile):.0%} of {profile.num_probes:,} probes rightly. {found}."


def _list_sentences(sentences: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in sentences) + "</ul>"


def _answer_table(profile: LayerProfile) -> str:
    """Answers by group; a dash where an older tracer did not look."""
    rows = [
        [
            name.replace("_", " "),
            f"{share:.0%}",
            f"{profile.copied_share[name]:.0%}" if name in profile.copied_share else "-",
            f"{profile.answer_entropy[name]:.2f}" if name in profile.answer_entropy else "-",
        ]
        for name, share in profile.answered_share.items()
    ]
    return render_table(["group", "right", "first token copied from the context", "entropy, nats"], rows)


def _stability_table(profile: LayerProfile) -> str:
    rows = []
    for name, values in profile.stability.items():
        boundary = f"{values['boundary']:.0f} ({values['boundary_change']:+.0f})" if "boundary" in values else ""
        if "same_boundary_share" in values:
            boundary = f"the same in {values['same_boundary_share']:.0%}, {values['boundary_change']:.1f} layers apart on average"
        particle = values.get("task_particle_correlation")
        rows.append(
            [
                CHECKS.get(name, name),
                f"{values['sensitivity_correlation']:.2f}",
                "unchanged" if particle is None else f"{particle:.2f}",
                f"{values['score_correlation']:.2f}",
                boundary,
                f"{values.get('num_probes', profile.num_probes):,.0f}",
            ]
        )
    headings = ["compared with", "rank correlation of LS", "of TP", "of S(k)", "boundary", "probes"]
    return render_table(headings, rows)
