"""Where the text comes from and how it becomes a token store."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from layerplan.config.base import StrictModel


class SourceConfig(StrictModel):
    """One source of raw documents."""

    path: str = Field(min_length=1)
    """A folder or file (JSONL plain/gz/zst, Parquet, Arrow, .txt/.md/.rst), local or at an `s3://`, `gs://` or other
    fsspec address; `hub://owner/dataset`: a Hugging Face data set, streamed, with the token of `HF_TOKEN` or
    `hf auth login`; or `machine://docs`: the documentation already on this machine (`machine://docs/python` and
    `machine://docs/packages` are its two halves); or `machine://catalogues/zh_CN`: the message catalogues that installed
    packages have for a language."""
    format: Literal["auto", "jsonl", "parquet", "arrow", "text"] = "auto"
    """`auto` goes by the file name's ending."""
    id_column: str = "id"
    """Column with the document id; a missing one is replaced by path and row number."""
    text_column: str = "text"
    """Column with the text."""
    score_column: str | None = None
    """Column with a quality score, if there is one."""
    split: str = "train"
    """Split of a `hub://` data set, or of a folder that `datasets` saved with several splits."""
    subset: str | None = None
    """Subset (configuration) of a `hub://` data set; its default one when left out."""
    revision: str | None = None
    """Branch, tag or commit of a `hub://` data set; the build notes the commit it read in its unit names."""
    weight: float | None = Field(default=None, gt=0)
    """Share of this source in every stretch of training, relative to the others' weights; small sources repeat then.
    Without weights every row of every source is read once per epoch."""
    max_documents: int | None = Field(default=None, ge=1)
    """Use at most so many documents, in file order; nothing is read beyond them."""


class FilterConfig(StrictModel):
    """Thresholds; each drops documents under its own counted reason."""

    min_chars: int = Field(default=50, ge=0)
    """Shortest document kept, in characters after normalisation."""
    max_chars: int = Field(default=5_000_000, ge=1)
    """Longest document kept, in characters."""
    min_score: float | None = None
    """Lowest quality score kept; documents without a score are kept."""
    max_line_repetition: float = Field(default=0.7, ge=0, le=1)
    """Largest share of characters in duplicate lines."""
    max_ngram_repetition: float = Field(default=0.7, ge=0, le=1)
    """Largest share of repeated character 10-grams."""
    min_cjk_ratio: float = Field(default=0.0, ge=0, le=1)
    """Smallest share of Chinese characters among letters; 0 keeps every language."""


class DecontaminationConfig(StrictModel):
    """n-gram overlap with benchmark questions and held-out documents."""

    enabled: bool = True
    """Look for benchmark questions and held-out documents in the corpus."""
    ngram: int = Field(default=13, ge=4)
    """Length of the matching n-gram, in characters after normalisation."""
    min_share: float = Field(default=0.5, gt=0, le=1)
    """Share of a question's n-grams that must occur in a document for it to be dropped."""


class CorpusConfig(StrictModel):
    """Raw documents to packed rows."""

    sources: list[SourceConfig] = Field(default_factory=lambda: [SourceConfig(path="machine://docs")], min_length=1)
    """Sources, each with its weight."""
    store: str | None = None
    """An existing token store to train on, local or at an address as in `sources`; nothing is built then."""
    upload_to: str | None = None
    """An address (`s3://bucket/store`) that the store's shards move to as they are finished, for a store larger than the
    disk; training reads it there."""
    mode: Literal["store", "on_the_fly"] = "store"
    """`store` builds a token store first and fixes the order of training; `on_the_fly` tokenizes while training, needs no
    disk, reads every document exactly once per epoch over any crash, and fixes no order."""
    seq_len: int = Field(default=4096, ge=16)
    """Tokens per row."""
    tokenizer_library: Literal["auto", "tokenizers"] = "auto"
    """`auto` encodes text with fastokens where it knows the kind of tokenizer (byte pairs), many times as fast as
    tokenizers, which it is held against on a sample; `tokenizers` always takes that."""
    end_of_text: str | None = None
    """The token that ends each document, by its name, such as `<|endoftext|>`; the one that the model's own files name
    when left out (`--dry-run` shows it)."""
    begin_token: Literal["auto", "none"] = "auto"
    """`auto` begins each document with what the model's tokenizer itself puts before a text, as those of Llama and Gemma
    do; `none` with nothing."""
    document_mask: bool = True
    """Whether a token sees its own document alone. `false` trains on plain causal rows, as the paper does: each row is one
    text, whose positions run on, whose tokens see all before them, and where the first token of a document is predicted
    too. The store is the same."""
    control_tokens: Literal["text", "token"] = "text"
    """What a control token that a document spells out (`<|endoftext|>`) becomes: `text`, as any other characters, or the
    `token` itself. Both are counted."""
    filters: FilterConfig = FilterConfig()
    """Document filters."""
    deduplicate: bool = True
    """Drop exact duplicates by normalised hash across the whole corpus."""
    decontamination: DecontaminationConfig = DecontaminationConfig()
    """Drop documents that contain benchmark questions or held-out documents."""
    rows_per_group: int = Field(default=64, ge=1)
    """Rows in one row group, the unit of shuffling and reading."""
    groups_per_shard: int = Field(default=64, ge=1)
    """Row groups in one shard file."""
    validation_rows: int = Field(default=64, ge=0)
    """Rows held out for the validation loss, taken before the lanes are formed."""
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    """Stop the build when a larger share of the input is malformed."""
    num_workers: int | None = Field(default=None, ge=1)
    """Tokenizer actors; one per CPU of the cluster when left out, fewer when there is little to read. The store's bytes
    do not depend on it."""
    num_cpus_per_worker: float = Field(default=0.5, ge=0)
    """CPU share each actor reserves on Ray."""
    num_writers: int = Field(default=2, ge=1, le=64)
    """Threads that compress and write shards beside the one that packs them. The store's bytes do not depend on it; each
    holds a shard in memory."""

    @field_validator("upload_to")
    @classmethod
    def _is_address(cls, value: str | None) -> str | None:
        if value is not None and "://" not in value:
            raise ValueError("an address such as s3://bucket/store is expected; a local store needs no upload")
        return value

    @model_validator(mode="after")
    def _weights_and_mode_fit(self) -> CorpusConfig:
        weighted = [source.weight is not None for source in self.sources]
        if any(weighted) and not all(weighted):
            raise ValueError(
                f"sources.{weighted.index(False)}.weight is missing: give every source a weight, or none of them"
            )
        if self.upload_to is not None and self.store is not None:
            raise ValueError("upload_to: nothing is built when `store` names an existing one; leave one of them out")
        if self.mode == "on_the_fly":
            faults = {
                "deduplicate=true: needs a pass over the whole corpus; set it to false": self.deduplicate,
                "store: an existing store has a fixed order; leave it out": self.store is not None,
                "upload_to: there is no store to upload; leave it out": self.upload_to is not None,
                "validation_rows: no rows are held out; set it to 0": self.validation_rows > 0,
                "sources.max_documents: documents are not counted across workers; leave it out": any(
                    source.max_documents is not None for source in self.sources
                ),
                "sources.weight: sources are read in their natural shares; leave it out": any(weighted),
            }
            for fault, is_there in faults.items():
                if is_there:
                    raise ValueError(f"mode=on_the_fly does not go with {fault}")
        return self
