"""How the layers are measured: LayerTracer and SALF."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from layerplan.config.base import StrictModel
from layerplan.config.labels import NodeLabels

Sensitivity = Literal["relative", "absolute"]


class TraceConfig(StrictModel):
    """Options of the tracer; every one of them is recorded in the layer profile."""

    probes: str = "builtin"
    """`builtin` (the project's own lexicon), a folder in the AntSynNET layout, or a `.jsonl` file of probes."""
    probes_per_group: int = Field(default=50, ge=1, le=10_000)
    """Probes in each of the ten groups."""
    probe_style: Literal["mixed", "uniform"] = "mixed"
    """`mixed` writes the second example pair with `-`, as the paper does; `uniform` uses `->` twice."""
    seed: int = Field(default=0, ge=0)
    """Seed of the probe selection."""
    mask: Literal["zero", "mean"] = "zero"
    """What replaces the context's hidden states: zeros, or their per-channel mean."""
    js_top_k: int = Field(default=10, ge=0)
    """Support of the Jensen-Shannon divergence: union of both top-k sets; 0 means the whole vocabulary."""
    js_top_k_check: int = Field(default=50, ge=0)
    """Second support, used for the stability evidence."""
    mask_check_every: int = Field(default=4, ge=1)
    """Every how many-th probe of a group is measured with the other mask too, for the stability evidence; 1 for all. The
    mean costs more than zeros, since rows that are not zero cannot be left out."""
    ratio_denominator: Literal["current", "previous"] = "current"
    """Denominator of the task-particle ratio (Eq. 1)."""
    task_particle_eps: float = Field(default=1e-8, gt=0)
    """Added to that denominator."""
    sensitivity_eps: float = Field(default=1e-4, gt=0)
    """Added to the denominator of the layer sensitivity (Eq. 6); 1e-8 turns the rounding of deep layers into peaks."""
    sensitivity: Sensitivity = "relative"
    """Sensitivity that S(k) is made of: the paper's |JS(l) - JS(l-1)| / JS(l-1), or |JS(l) - JS(l-1)| itself. Both are
    measured and reported; a choice that is not the default counts as a second try against p."""
    task_particle_threshold: float = Field(default=0.5, gt=0)
    """Theta: a layer whose ratio exceeds it is a task particle."""
    deviation_norm: Literal["hf", "all", "none"] = "hf"
    """Which residual states pass the final norm before SALF deviations: only the last (`hf`), all, or none. Where the head
    reads another width than the layers pass on (OPT-350m), all of them pass what leads to it."""
    batch_size: int = Field(default=16, ge=1)
    """Most probes per forward pass; a pass holds probes of one length, and fewer of them when they are long."""
    num_actors: int = Field(default=1, ge=1)
    """Tracer replicas in the Ray Data actor pool."""
    num_cpus_per_actor: float = Field(default=0.5, ge=0)
    """CPU share each replica reserves on Ray."""
    num_gpus_per_actor: float = Field(default=0.0, ge=0)
    """GPU share each replica reserves; fractions are allowed."""
    labels: NodeLabels = {}
    """Nodes that replicas may be on, by Ray's labels: `{ray.io/accelerator-type: L4}`. All must hold."""
    bootstrap_samples: int = Field(default=1000, ge=10)
    """Resamples of the probes behind the intervals in the explanation."""
