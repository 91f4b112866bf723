"""A model as it is handed on: its name, its revision, and whether its own code may run, always the three together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from layerplan.models.skeleton import Skeleton
    from layerplan.plan.layer_profile import ModelIdentity
    from layerplan.plan.model_shape import ModelShape


@dataclass(frozen=True)
class ModelRef:
    """A causal language model by its address; nothing is read before a method asks for it, and torch not before `load`.

    Example:
        >>> model = ModelRef("owner/name", revision="v2")
        >>> str(model), str(model.at("runs/first/hf/step_00000004"))
        ('owner/name', 'runs/first/hf/step_00000004')
    """

    name: str
    """Folder or hub id."""
    revision: str = "main"
    """Branch, tag or commit of a hub id; ignored for folders."""
    trust_remote_code: bool = False
    """Whether the user allowed the Python code that comes with the model; it holds for what is exported of it too."""

    def __post_init__(self) -> None:
        if self.name.startswith("~"):  # here, since to transformers it is a hub id, and a worker's home may be another
            object.__setattr__(self, "name", str(Path(self.name).expanduser()))

    def __str__(self) -> str:
        return self.name

    def at(self, folder: Path | str) -> ModelRef:
        """An export of this model: the consent to its code goes along, the revision does not."""
        return ModelRef(str(folder), trust_remote_code=self.trust_remote_code)

    def at_commit(self) -> ModelRef:
        """This model at the commit that its revision stands at now, which may move; itself where it is a folder.

        Raises:
            ModelError: When the hub has no such model or revision.
        """
        from layerplan.models.files import find_commit

        commit = find_commit(self.name, revision=self.revision)
        return self if commit is None else replace(self, revision=commit)

    def config(self) -> dict[str, Any]:
        """The values of `config.json`; raises `ModelError` when it is missing or malformed."""
        from layerplan.models.files import load_hf_config

        return load_hf_config(self.name, revision=self.revision)

    def identity(self, *, with_weights: bool = True) -> ModelIdentity:
        """Who the model is: config facts and the hash of its weights, unless a hub id's need not be fetched for it.

        Raises:
            ModelError: When one is missing.
        """
        from layerplan.models.files import identify_model

        return identify_model(self.name, revision=self.revision, with_weights=with_weights)

    def hash_files(self) -> dict[str, str]:
        """Hashes of its config, weights and code, by these words; raises `ModelError`."""
        from layerplan.models.files import hash_deciding_files

        return hash_deciding_files(self.name, revision=self.revision, trust_remote_code=self.trust_remote_code)

    def shape(self) -> ModelShape:
        """Its sizes, from config and code, no weight; raises `ModelError` when no causal model can be built from them."""
        from layerplan.models.model_sizes import load_model_shape

        self.check_consent()
        return load_model_shape(self.name, revision=self.revision, trust_remote_code=self.trust_remote_code)

    def num_params(self) -> int:
        """Numbers in its weights: of a folder by its files' headers, else by its config; raises `ModelError` without."""
        from math import prod

        from layerplan.models.weight_files import read_stored_tensors

        folder = Path(self.name).expanduser()
        if not folder.is_dir():
            return self.shape().total_params
        return sum(prod(tensor.shape) for tensor in read_stored_tensors(folder).values())

    def max_positions(self) -> int | None:
        """Tokens its positions can hold, None where nothing bounds them; raises `ModelError` without a config."""
        from layerplan.models.positions import find_max_positions

        return find_max_positions(self.name, revision=self.revision)

    def tokenizer_file(self) -> Path:
        """Its `tokenizer.json`, fetched when it lies on the hub; raises `ModelError` when there is none."""
        from layerplan.models.files import find_tokenizer_file

        return find_tokenizer_file(self.name, revision=self.revision)

    def tokenizer(self) -> Any:
        """Its fast tokenizer; raises `ModelError` when there is none."""
        from layerplan.models.causal_lm import load_tokenizer

        return load_tokenizer(self.name, revision=self.revision, trust_remote_code=self.trust_remote_code)

    def folder(self, *, with_weights: bool = False) -> Path:
        """Its folder, for a hub id a snapshot without weights or with; raises `ModelError` when there is none."""
        from layerplan.models.files import fetch_model_folder

        return fetch_model_folder(self.name, revision=self.revision, with_weights=with_weights)

    def check(self) -> None:
        """Raises `ModelError` for what is no base: config, kind of checkpoint, every tensor by name, dtype and shape."""
        from layerplan.models.base_check import check_base_model

        check_base_model(self.name, revision=self.revision, trust_remote_code=self.trust_remote_code)

    def check_consent(self) -> None:
        """Raises `ModelError` when only code of its own can build the model, and that was not allowed."""
        from layerplan.models.base_check import refuse_code_without_consent

        refuse_code_without_consent(self.name, self.config(), trust_remote_code=self.trust_remote_code)

    def fetch(self) -> None:
        """Brings a model that lies in a run at an address to this machine; nothing for any other, whose name says where it is."""
        from layerplan.storage.mirror import fetch_folder

        fetch_folder(Path(self.name))

    def load(self, *, dtype: torch.dtype | None = None) -> nn.Module:
        """The model in eval mode, float32 unless told otherwise, from safetensors alone, every tensor accounted for.

        Raises:
            ModelError: When config or weights are missing or do not fit together, or its own code is not allowed.
        """
        import torch

        from layerplan.models.causal_lm import load_causal_lm

        self.fetch()
        return load_causal_lm(
            self.name, revision=self.revision, dtype=dtype or torch.float32, trust_remote_code=self.trust_remote_code
        )

    def skeleton(self) -> Skeleton:
        """The model without the memory of its weights, and what reads them, a parameter or some of its rows at a time.

        Raises:
            ModelError: As `load`, before any weight is read.
        """
        from layerplan.models.skeleton import load_skeleton

        self.fetch()
        return load_skeleton(self.name, revision=self.revision, trust_remote_code=self.trust_remote_code)
