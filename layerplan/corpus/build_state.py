"""What a build knows about itself: where reading goes on, every number, and how it stood when a shard was complete."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from layerplan.corpus.pack import RawRow
from layerplan.run_folder import CONTAMINATED_NAME, QUARANTINE_NAME


@dataclass
class SourceProgress:
    """What one source gave so far."""

    counts: Counter[str] = field(default_factory=Counter)
    num_documents: int = 0
    num_full_rows: int = 0
    num_rows: int = 0
    num_tokens: int = 0
    num_padding_tokens: int = 0
    num_validation_rows: int = 0
    num_validation_tokens: int = 0
    num_control_documents: int = 0
    num_control_tokens: int = 0


@dataclass
class BuildState:
    """All of a build that resumes beside rows: where reading goes on, and every number."""

    unit: int = 0
    """Unit to read next."""
    skip: int = 0
    """Its documents that are done."""
    sources: list[SourceProgress] = field(default_factory=list)
    shards: list[dict[str, Any]] = field(default_factory=list)
    lost_bytes: int = 0
    first_fault: str = ""
    list_bytes: dict[str, int] = field(default_factory=lambda: {QUARANTINE_NAME: 0, CONTAMINATED_NAME: 0})
    """Committed length of each list."""


@dataclass(frozen=True)
class Standing:
    """How a build stood between two records, to be committed once its shards are on disk."""

    num_shards: int
    state: dict[str, Any]
    """The build's state, its list of shards left out."""
    rows: dict[str, list[RawRow]]
