"""What the tracer measured, as a value: `layer_profile.json`.

Lists over decoder layers are indexed by `layer_idx` (0 beside the embeddings); entry i belongs to the papers' block
l = i + 1. Rows are probe groups in the order of `groups`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from layerplan.artifacts import compute_sha256, read_sealed, write_sealed
from layerplan.config.base import StrictModel

SCHEMA_VERSION = 3
EMPTY_SIDE_RULE = "empty_side_as_zero"
"""Rule of layout 1: the largest S, a side without a layer counting as 0."""
ENOUGH_ANSWERS = 30
"""Fewest right and fewest wrong answers that are compared."""


class ModelSource(StrictModel):
    """The GGUF file a model's weights were de-quantised from."""

    file: str
    """File name."""
    sha256: str
    """Hash of its bytes."""
    tensor_types: dict[str, int]
    """GGUF type to number of tensors, commonest first."""
    note: str = ""
    """What of the file could not be taken over as it says; empty when nothing."""

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {name}" for name, count in self.tensor_types.items())
        return f"{self.file} (sha256 {self.sha256[:12]}; tensors: {kinds})"


def is_commit(text: str) -> bool:
    """Whether a model's revision is a commit's full name, which always means the same files, and no branch or tag."""
    return re.fullmatch("[0-9a-f]{40}", text) is not None


class ModelIdentity(StrictModel):
    """Which model an artifact belongs to."""

    name: str
    """Folder name or hub id as configured."""
    revision: str = "main"
    """Commit, or the branch or tag where no commit was asked for; `main` for folders."""
    model_type: str
    """`model_type` of the Hugging Face config."""
    num_layers: int = Field(ge=1)
    """Decoder layers."""
    weights_sha256: str | None = None
    """Hash over the names, shapes and bytes of the weights, when they were at hand."""
    source: ModelSource | None = None
    """Where the weights were converted from; None for weights as they were published."""

    @model_serializer(mode="wrap")
    def _leave_out_no_source(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Identities without a source read as they did before there were sources, so that old artifacts keep their hash."""
        values: dict[str, Any] = handler(self)
        if self.source is None:
            values.pop("source", None)
        return values


class SemanticProfile(StrictModel):
    """SALF deviations of one kind."""

    deviation: list[float]
    """d(k), k = 0..L: mean deviation from the gold label after k layers."""
    gain: list[float]
    """d(l-1) - d(l) per layer."""
    eof_layer: int = Field(ge=0)
    """argmax of the gain, 0-based: layers [0, eof_layer) freeze."""


class Interval(StrictModel):
    """A bootstrap interval."""

    low: float
    """2.5 % quantile."""
    high: float
    """97.5 % quantile."""


class AnswerComparison(StrictModel):
    """Profiles of rightly and of wrongly answered probes, over the groups that hold both."""

    num_right: int = Field(ge=1)
    """Right answers in those groups."""
    num_wrong: int = Field(ge=1)
    """Wrong answers in those groups."""
    task_particle_correlation: float
    """Rank correlation of the two Ratio(l) over layers."""
    sensitivity_correlation: float
    """Rank correlation of the two LS(l) over layers."""
    right_boundary: int | None
    """Best boundary of the right answers alone, under `change_point`."""
    wrong_boundary: int | None
    """Best boundary of the wrong answers alone."""
    p_value: float = Field(ge=0, le=1)
    """Share of random assignments of right and wrong within the groups whose profiles differ at least as much."""


class LayerProfile(StrictModel):
    """Everything the plan policies and the figures need, with the options and the probe set that gave it."""

    schema_version: int = SCHEMA_VERSION
    """Version of this layout."""
    model: ModelIdentity
    """The measured model."""
    options: dict[str, Any]
    """The resolved trace options, but for those that only say where the measurement ran."""
    probe_set_sha256: str
    """Hash of the probes' prompts and spans."""
    groups: list[str]
    """Probe groups, the rows of the heat maps."""
    num_probes: int = Field(ge=1)
    """Probes measured."""
    answered_share: dict[str, float]
    """Per group: share of probes whose most likely token is the right answer's first token."""
    num_right: int | None = None
    """Probes answered rightly; None in layout 1."""
    copied_share: dict[str, float] = Field(default_factory=dict)
    """Per group: share of probes whose most likely token stands in their context; empty where it was not measured."""
    answer_entropy: dict[str, float] = Field(default_factory=dict)
    """Per group: mean entropy of the answer's distribution in nats; empty where it was not measured."""
    right_and_wrong: AnswerComparison | None = None
    """Right answers against wrong ones; None with too few of a kind."""
    task_particle: list[float]
    """Mean of the group rows of Ratio(l), L values."""
    task_particle_rows: list[list[float]]
    """Group rows of Ratio(l)."""
    task_particle_median: list[float]
    """Median over probes of Ratio(l)."""
    task_particle_log: list[float]
    """Mean of |log P(l) - log P(l-1)|."""
    task_particle_interval: tuple[int, int]
    """Half-open range of layer indices: the longest run above the threshold; (0, 0) when there is none."""
    task_particle_argmax: int
    """Layer index of the largest mean ratio."""
    js: list[float]
    """Mean JS(l), l = 0..L (L + 1 values; the last is 0)."""
    layer_sensitivity: list[float]
    """Mean of the group rows of LS(l), l = 1..L-1 (L - 1 values; LS(L) is 1 by construction and dropped)."""
    layer_sensitivity_rows: list[list[float]]
    """Group rows of LS(l)."""
    absolute_sensitivity: list[float]
    """Mean |JS(l) - JS(l-1)|, l = 1..L (L values)."""
    alignment_score: list[float]
    """S(k) for k = 1..L-2 (Eq. 7), from the sensitivity that `options` name; entry i belongs to boundary i + 1."""
    best_boundary: int | None = Field(default=None, ge=1)
    """argmax of S; None for a model of two layers, which has no S. A plan has a rule and evidence of its own."""
    semantic: dict[Literal["cosine", "ce", "rank"], SemanticProfile] = Field(default_factory=dict)
    """SALF deviations by kind."""
    uncertainty: dict[str, list[Interval]] = Field(default_factory=dict)
    """Bootstrap intervals over probes for `task_particle`, `layer_sensitivity` and `alignment_score`."""
    probe_stability: dict[str, list[float]] = Field(default_factory=dict)
    """Per rule: share of bootstrap resamples of the probes in which boundary i + 1 is chosen; L - 2 values that add up to 1.
    Stability over probes, not evidence for a boundary."""
    stability: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Per check (`top_k`, `mask`, `halves`): rank correlations and what becomes of the boundary (`tracer/stability.py`)."""
    measured_by: dict[str, dict[str, int]] = Field(default_factory=dict)
    """Per mask, probes measured with it by the way their copies were computed (`tracer/masking.py`); all are exact."""
    head_row_semantic: dict[Literal["ce", "rank"], SemanticProfile] = Field(default_factory=dict)
    """Of a profile in layout 1 or 2 alone: deviations from the head's rows in place of the labels' bases. No plan uses them."""
    empty_side_boundary: int | None = None
    """Of a profile in layout 1 alone: the boundary it chose, a side without a layer counting as 0."""
    sha256: str = ""
    """Hash over every other field."""

    @model_validator(mode="before")
    @classmethod
    def _read_older_layouts(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if values.get("schema_version") == 1:
            values = _convert_layout_1(values)
        return _convert_layout_2(values) if values.get("schema_version") in (1, 2) else values

    def sealed(self) -> LayerProfile:
        """Returns a copy whose hash matches its content."""
        return self.model_copy(update={"sha256": _content_hash(self)})

    def save(self, path: Path) -> None:
        """Writes the sealed profile as JSON."""
        write_sealed(path, self.sealed())

    @classmethod
    def load(cls, path: Path) -> LayerProfile:
        """Reads a profile; raises `PlanError` when it is missing, malformed or changed."""
        return read_sealed(path, cls)


def _convert_layout_1(values: Mapping[str, Any]) -> dict[str, Any]:
    """Drops S(L-1), which only an empty side gave, and names what it decided; the measurement itself is as it was."""
    found = dict(values)
    scores = list(found["alignment_score"])[:-1]
    found["alignment_score"] = scores
    found["empty_side_boundary"] = found["best_boundary"]
    found["best_boundary"] = 1 + scores.index(max(scores)) if scores else None
    found["probe_stability"] = {EMPTY_SIDE_RULE: shares} if (shares := found.pop("boundary_win_share", [])) else {}
    uncertainty = dict(found.get("uncertainty", {}))
    if "alignment_score" in uncertainty:
        uncertainty["alignment_score"] = uncertainty["alignment_score"][:-1]
    return {**found, "uncertainty": uncertainty}


def _convert_layout_2(values: Mapping[str, Any]) -> dict[str, Any]:
    """Sets `ce` and `rank` aside, which were taken from the head's rows and not from the labels' semantic bases."""
    semantic = dict(values.get("semantic") or {})
    by_rows = {kind: semantic.pop(kind) for kind in ("ce", "rank") if kind in semantic}
    return {**values, "semantic": semantic, "head_row_semantic": by_rows}


def _content_hash(value: StrictModel) -> str:
    return compute_sha256(value.model_dump(mode="json", exclude={"sha256"}))
