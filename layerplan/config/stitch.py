"""A base put together from layers of existing models: which layer stands where, and what is new."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from layerplan.config.base import StrictModel


class DonorConfig(StrictModel):
    """An existing model that layers are taken from."""

    name: str = Field(min_length=1)
    """Folder, hub id or `.gguf` file, as of `model.name` of a pretrained model."""
    revision: str = "main"
    """Branch, tag or commit of a hub id; ignored for folders."""
    trust_remote_code: bool = False
    """Run Python code that comes with the donor."""


class LayerRunConfig(StrictModel):
    """Some layers in a row: a donor's, or new ones of a kind."""

    donor: str | None = None
    """Name of a donor."""
    layers: str | list[int] | None = None
    """Which of its layers, in this order: a half-open range such as `14:28`, or indices; of a NemotronH in a hybrid its blocks,
    of which two are a layer."""
    kind: str | None = None
    """Kind of new layers: `nemotron` (a Mamba2 block and its feed-forward block) or `qwen3`."""
    count: int | None = Field(default=None, ge=1)
    """How many new layers."""

    @model_validator(mode="after")
    def _one_of_both(self) -> LayerRunConfig:
        given = {name for name in ("donor", "layers", "kind", "count") if getattr(self, name) is not None}
        if given not in ({"donor", "layers"}, {"kind", "count"}):
            raise ValueError(f"give donor and layers, or kind and count (got {', '.join(sorted(given)) or 'nothing'})")
        return self


class ExpansionConfig(StrictModel):
    """Copies of a donor's layers, each behind its original and without effect until it is trained."""

    copies: int | None = Field(default=None, ge=1)
    """How many; `after: [...]` counts for itself."""
    after: Literal["even", "profile"] | list[int] = "even"
    """Behind which layers: one at the end of each of `copies` equal stretches, the `copies` most sensitive by `profile`, or
    these."""
    profile: str | None = None
    """A `layer_profile.json` of the donor, for `after: profile`."""

    @model_validator(mode="after")
    def _fields_belong_together(self) -> ExpansionConfig:
        by_hand = isinstance(self.after, list)
        if by_hand == (self.copies is not None):
            raise ValueError(f"after={self.after} {'names the copies itself' if by_hand else 'needs copies'}")
        if (self.after == "profile") != (self.profile is not None):
            raise ValueError(f"after={self.after} with profile={self.profile}: one belongs to the other")
        return self


class StitchedModelConfig(StrictModel):
    """A base that the job puts together: layers of donors, byte for byte, and new layers beside them."""

    type: Literal["stitched"] = "stitched"
    donors: dict[str, DonorConfig] = Field(min_length=1)
    """Models that layers, embeddings, norm and head come from, by a name of your own."""
    layers: list[LayerRunConfig] | None = Field(default=None, min_length=1)
    """The decoder from the embeddings up; this or `expand`."""
    expand: ExpansionConfig | None = None
    """The only donor with copies of its layers inserted; this or `layers`."""
    embeddings: str | None = None
    """Donor of the input embedding and of the tokenizer; the first one when left out."""
    final_norm: str | None = None
    """Donor of the norm after the last layer; that of the embeddings when left out."""
    lm_head: str | None = None
    """Donor of the output head; that of the embeddings when left out, and always where the two are tied."""
    kind_sizes: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Sizes of kinds of new layers, as the family's own config names them; docs/hybrids.md lists them."""

    @model_validator(mode="after")
    def _one_of_layers_and_expand(self) -> StitchedModelConfig:
        if (self.layers is None) == (self.expand is None):
            raise ValueError("give exactly one of layers and expand")
        if self.expand is not None and len(self.donors) > 1:
            raise ValueError(f"expand takes one donor, there are {len(self.donors)}: {', '.join(self.donors)}")
        named = {"embeddings": self.embeddings, "final_norm": self.final_norm, "lm_head": self.lm_head}
        named |= {f"layers.{index}.donor": run.donor for index, run in enumerate(self.layers or ())}
        for field, name in named.items():
            if name is not None and name not in self.donors:
                raise ValueError(f"{field}={name}: is none of the donors ({', '.join(self.donors)})")
        return self

    @property
    def first_donor(self) -> str:
        """Name of the donor whose embedding and tokenizer it has."""
        return self.embeddings or next(iter(self.donors))
