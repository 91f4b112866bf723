"""The part of the page that shows what the tracer measured, and whether another choice would have changed it."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from layerplan.plan.explain import describe_certainty, describe_measurement
from layerplan.plan.layer_profile import PROBES_NAME, LayerProfile
from layerplan.report.figures import Deviations
from layerplan.report.html_parts import embed_svg, render_table

SHOWN_DEVIATIONS = ("cosine", "ce")
CAPTIONS = {
    "profiles": "Normalised profiles (the paper's Figure 10): where task evidence moves, and where a masked context"
    " still matters; bands are 95 % bootstrap intervals over probes.",
    "alignment_score": "Alignment score of every boundary (Eq. 7) with its interval; bars: share of bootstrap resamples"
    " in which the boundary wins.",
    "task_particle": "Task particle by probe group (Figure 4, top row).",
    "layer_sensitivity": "Layer sensitivity by probe group (Figure 4, bottom row).",
    "semantic": "SALF: mean deviation from the right answer after each layer, and where freezing would end.",
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


def render_measurement(profile: LayerProfile | None, figures: Mapping[str, Figure]) -> str:
    """HTML of the measurement: sentences, figures, answers by group, stability."""
    if profile is None:
        return ""
    sentences = [*describe_measurement(profile), *describe_certainty(profile)]
    text = "<h2>What was measured</h2><ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in sentences) + "</ul>"
    for name, caption in CAPTIONS.items():
        if name in figures:
            text += f'<figure>{embed_svg(figures[name])}<figcaption class="soft">{html.escape(caption)}</figcaption></figure>'
    rows = [[name.replace("_", " "), f"{share:.0%}"] for name, share in profile.answered_share.items()]
    text += "<h2>Probes answered rightly</h2>" + render_table(["group", "share"], rows)
    return text + "<h2>How stable the measurement is</h2>" + _stability_table(profile)


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
