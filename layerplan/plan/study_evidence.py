"""What studies found that trained every plan of a grid: `study_evidence.json`, made by `benchmarks/study_evidence.py`."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from typing import Literal

from pydantic import Field, model_validator

from layerplan.config.base import StrictModel

Text = Literal["target", "source"]


class StudiedPlan(StrictModel):
    """A plan that was trained on every seed of a study."""

    trains: str
    """`full`, `deep` or `shallow` for a side of a boundary, `spread` for evenly spaced layers, or the measurement that chose."""
    num_trained: int = Field(ge=1)
    """Decoder layers that trained."""
    flops_share: float = Field(gt=0)
    """Of training everything, on the study's model."""
    rate: float = Field(gt=0)
    """Its learning rate, tuned for about so many layers."""
    loss: dict[Text, float]
    """Mean over seeds and held-out rows, nats a token."""


class Study(StrictModel):
    """One model continued on one text by every plan of a grid; without plans while it is not finished."""

    name: str
    """Of its config in `benchmarks/studies`."""
    model_type: str
    """Family of the base."""
    num_layers: int = Field(ge=2)
    """Of the base."""
    target: str
    """Text that was trained on."""
    source: str
    """Text the base knew."""
    seeds: list[int]
    """Each of which drew its own rows."""
    held_out_rows: int
    """Rows of each text that every plan was scored on."""
    tokens: int
    """That one training saw."""
    seq_len: int
    """Tokens of a row, for which shares of FLOPs hold."""
    commits: list[str]
    """Of the code that trained."""
    planned: int
    """Trainings of plans and of measurements' choices, by seed."""
    done: int
    """Of them finished."""
    base: dict[Text, float]
    """Loss before training."""
    noise: dict[Text, float]
    """What a seed moves a plan's loss by beyond what it moves all plans: one standard deviation, nats."""
    plans: list[StudiedPlan]
    """Everything, sides of boundaries, evenly spaced layers."""
    rivals: list[StudiedPlan]
    """What measurements chose."""

    @model_validator(mode="after")
    def _is_whole(self) -> Study:
        if self.is_finished != bool(self.plans):
            raise ValueError(f"{self.name}: a study has plans when all of its trainings are done")
        return self

    @property
    def is_finished(self) -> bool:
        """Whether every plan was trained on every seed."""
        return self.done == self.planned


class StudyEvidence(StrictModel):
    """All studies there are."""

    command: str
    """That made this file."""
    studies: list[Study]
    """By name."""


@lru_cache(maxsize=1)
def load_study_evidence() -> StudyEvidence:
    """The package's own evidence."""
    text = files("layerplan.plan").joinpath("study_evidence.json").read_text(encoding="utf-8")
    return StudyEvidence.model_validate_json(text)
