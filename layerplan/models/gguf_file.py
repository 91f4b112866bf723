"""A GGUF file before a weight of it is read: that it is whole, what architecture it holds, and how it is stored.

The `gguf` package parses the file and de-quantises; which architectures can become a model is for `transformers` to say.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from layerplan.artifacts import hash_file
from layerplan.errors import ModelError, first_line
from layerplan.plan.layer_profile import ModelSource

GGUF_SUFFIX = ".gguf"
SOURCE_NAME = "gguf_source.json"
"""In a converted folder: which GGUF file it was made of."""
FLOAT_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""GGUF types that hold values rather than blocks, with torch's name of each."""


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file whose header was read and whose bytes are all there."""

    path: Path
    reader: Any
    """The `gguf.GGUFReader`; its tensors are views of the mapped file."""
    architecture: str

    @property
    def type_counts(self) -> dict[str, int]:
        """Tensors of each type, commonest first."""
        return dict(Counter(tensor.tensor_type.name for tensor in self.reader.tensors).most_common())

    def describe_source(self, *, note: str = "") -> ModelSource:
        """Name, hash and types of the file, as the converted folder and its plans keep them, and what is in doubt."""
        return ModelSource(
            file=self.path.name,
            sha256=hash_file(self.path),
            tensor_types=self.type_counts,
            note=note,
        )

    def choose_dtype(self) -> str:
        """The narrowest of float16, bfloat16 and float32 that holds every stored value exactly.

        Blocks are a scale times small integers plus an offset, which needs float32. A file of one half type keeps it when
        its float32 tensors (the norms, as llama.cpp writes them) lose nothing by it.
        """
        halves = set(self.type_counts) - {"F32"}
        if len(halves) == 1 and halves <= set(FLOAT_TYPES):
            name = FLOAT_TYPES[halves.pop()]
            if all(_survives(tensor.data, name) for tensor in self.reader.tensors if tensor.tensor_type.name == "F32"):
                return name
        return "float32"


def open_gguf(path: Path) -> GgufFile:
    """Reads the header and looks at the place and type of every tensor.

    Raises:
        ModelError: When the `gguf` package is missing, or the file is no GGUF file, cut off, one part of several, or
            holds a quantisation that the package cannot undo.
    """
    gguf = import_gguf(path)
    if not path.is_file():
        raise ModelError(f"model.name={path}: no such file; a GGUF file is expected, download it first")
    try:
        reader = gguf.GGUFReader(str(path))
        architecture = str(reader.fields["general.architecture"].contents())
    except Exception as error:  # a cut file fails wherever its bytes end: ValueError, IndexError, KeyError
        raise ModelError(_explain_header(path, error)) from None
    _refuse_parts(path, reader)
    file = GgufFile(path, reader, architecture)
    _refuse_unknown_types(file, gguf)
    return file


def import_gguf(path: Path) -> Any:
    """The `gguf` package; raises `ModelError` with the command that installs it."""
    try:
        import gguf
    except ImportError:
        raise ModelError(
            f"model.name={path}: GGUF files are read by the package gguf, which is not installed; run"
            " `pip install --no-deps gguf`, or give a folder of safetensors"
        ) from None
    return gguf


def read_source(folder: Path) -> ModelSource | None:
    """Which GGUF file a folder's weights come from; None for any other folder.

    Raises:
        ModelError: When the file that says so cannot be read.
    """
    path = folder / SOURCE_NAME
    if not path.is_file():
        return None
    try:
        return ModelSource.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model.name={folder}: {SOURCE_NAME} cannot be read ({first_line(error)})") from None


def _explain_header(path: Path, error: Exception) -> str:
    words = first_line(error)
    if "GGMLQuantizationType" in words:
        return (
            f"model.name={path}: a tensor has a quantisation that the gguf package does not know ({words}); {_UPDATE}"
        )
    if "magic" in words.lower():
        return f"model.name={path}: is no GGUF file ({words})"
    return f"model.name={path}: is not a whole GGUF file ({words}); copy it again"


_UPDATE = "update the package (`pip install --no-deps -U gguf`) or take the file in another quantisation, such as Q8_0"


def _refuse_parts(path: Path, reader: Any) -> None:
    count = reader.fields.get("split.count")
    if count is not None and int(count.contents()) > 1:
        raise ModelError(
            f"model.name={path}: is one of {int(count.contents())} parts; merge them with `llama-gguf-split --merge`"
        )


def _refuse_unknown_types(file: GgufFile, gguf: Any) -> None:
    """Asks the package to undo one block of zeros of each type."""
    for kind in {tensor.tensor_type for tensor in file.reader.tensors}:
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
        except Exception as error:
            raise ModelError(
                f"model.name={file.path}: holds {kind.name} tensors, which the gguf package cannot de-quantise"
                f" ({first_line(error)}); {_UPDATE}"
            ) from None


def _survives(values: np.ndarray, dtype: str) -> bool:
    """Whether float32 values are the same after a turn through a half type."""
    import torch

    exact = torch.from_numpy(np.array(values))
    return bool(torch.equal(exact.to(getattr(torch, dtype)).float(), exact))
