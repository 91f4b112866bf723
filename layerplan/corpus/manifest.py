"""The manifest of a token store: what is in it, where it came from, and what was left out and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from layerplan.config.base import StrictModel
from layerplan.errors import CorpusError

MANIFEST_NAME = "manifest.json"
VALIDATION_NAME = "validation.parquet"


class Shard(StrictModel):
    """One Parquet file of training rows."""

    name: str
    """File name below the store."""
    num_rows: int = Field(ge=1)
    """Rows in it."""
    sha256: str
    """Hash of the file."""


class Manifest(StrictModel):
    """Everything a reader of the store must know; written last, so a store without it is incomplete."""

    schema_version: int = 1
    """Version of this layout."""
    seq_len: int
    """Tokens per row."""
    rows_per_group: int
    """Rows in every row group but the last."""
    num_rows: int
    """Training rows."""
    num_validation_rows: int
    """Held-out rows."""
    num_tokens: int
    """Tokens in training rows, padding left out."""
    num_padding_tokens: int
    """Padding of the last row."""
    vocab_size: int
    """Entries of the tokenizer; ids lie below it."""
    end_of_text_id: int
    """Token that ends each document."""
    tokenizer_sha256: str
    """Hash of `tokenizer.json`."""
    config_sha256: str
    """Hash of the corpus config."""
    counts: dict[str, int]
    """Documents: `in`, `kept`, `duplicate`, `contaminated`, `quarantined`, `filtered/<reason>`."""
    sources: dict[str, int]
    """Documents kept per source."""
    quarantine: list[dict[str, Any]] = Field(default_factory=list)
    """Malformed input: where and why."""
    shards: list[Shard]
    """Shards in row order."""

    @property
    def content_sha256(self) -> str:
        """One hash for the whole store: over the shards' hashes and the shape."""
        from layerplan.plan.hashing import compute_sha256

        return compute_sha256(self.model_dump(mode="json", include={"seq_len", "rows_per_group", "num_rows", "shards"}))

    @classmethod
    def load(cls, store: Path) -> Manifest:
        """Reads the manifest of a store.

        Raises:
            CorpusError: When the store is missing, incomplete or malformed.
        """
        path = store / MANIFEST_NAME
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CorpusError(
                f"corpus.store={store}: no {MANIFEST_NAME}; not a token store, or its build did not finish"
            ) from None
        except (OSError, ValidationError, UnicodeDecodeError) as error:
            raise CorpusError(f"{path}: not a readable manifest ({' '.join(str(error).split())[:200]})") from None
