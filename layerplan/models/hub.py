"""Models of the Hugging Face hub: fetched into its cache, and what keeps one from being fetched, in one line."""

from __future__ import annotations

import json
import logging
from functools import lru_cache
from pathlib import Path

from layerplan.errors import ModelError, first_line
from layerplan.models.weight_files import INDEX_NAME, OTHER_FORMATS, WEIGHTS_NAME, explain_absence, read_index
from layerplan.plan.layer_profile import is_commit

logger = logging.getLogger(__name__)

WEIGHT_SUFFIXES = (*OTHER_FORMATS, ".safetensors", ".onnx_data", ".tflite", ".ot", ".mlmodel", ".pkl", ".distcp")


def fetch_file(name: str, filename: str, *, revision: str = "main") -> Path:
    """One file of a hub id, in the cache's folder of its commit.

    Raises:
        ModelError: When the hub has no such model, revision or file, or cannot give it.
    """
    _check_id(name)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        return Path(hf_hub_download(name, filename, revision=revision))
    except RemoteEntryNotFoundError:
        raise ModelError(f"model.name={name}: the hub has no {filename} of it") from None
    except Exception as error:
        raise _explain(error, name, revision) from None


def fetch_folder(name: str, *, revision: str = "main", with_weights: bool = False) -> Path:
    """The snapshot of a hub id: its small files, and the weights that transformers reads where they are wanted.

    What a commit holds never changes, so of one the hub is asked once in a process.

    Raises:
        ModelError: When the hub has no such model or revision, or cannot give it.
    """
    _check_id(name)
    return (_fetch_commit if is_commit(revision) else _fetch_snapshot)(name, revision, with_weights)


def list_fetched_weights(folder: Path) -> tuple[Path, ...]:
    """The weight files of a snapshot that transformers reads, whatever else another program has fetched into it."""
    return tuple(path for path in map(folder.joinpath, _name_weights(folder)) if path.is_file())


def is_cached(name: str, filename: str, *, revision: str = "main") -> bool:
    """Whether a file can be had without a network."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, filename, revision=revision), str)


def _fetch_snapshot(name: str, revision: str, with_weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(name, revision=revision, ignore_patterns=[f"*{each}" for each in WEIGHT_SUFFIXES])
        )
        if with_weights:
            wanted = _name_weights(folder)
            _refuse_other_formats(name, folder, wanted)
            if missing := sum(not (folder / file).exists() for file in wanted):
                logger.info(
                    "fetching weights of %s from the hub, %d of %d files%s",
                    name,
                    missing,
                    len(wanted),
                    _show_size(folder),
                )
            snapshot_download(name, revision=folder.name, allow_patterns=wanted)
    except ModelError:
        raise
    except Exception as error:
        raise _explain(error, name, revision) from None
    return folder


_fetch_commit = lru_cache(maxsize=8)(_fetch_snapshot)


def _name_weights(folder: Path) -> list[str]:
    return sorted(set(read_index(folder).values())) if (folder / INDEX_NAME).is_file() else [WEIGHTS_NAME]


def _refuse_other_formats(name: str, folder: Path, wanted: list[str]) -> None:
    """Raises `ModelError` when the hub has none of the files, with what it has instead; it is not asked once one is here."""
    if any((folder / file).exists() for file in wanted):
        return
    from huggingface_hub import HfApi

    try:
        files = HfApi().list_repo_files(name, revision=folder.name)
    except Exception:  # it cannot be asked: whoever reads the weights says that there are none
        return
    if not set(wanted) & set(files):
        remedy = "download a GGUF file of it and name that, such as "
        raise ModelError(f"model.name={name}: {explain_absence(files, where='the hub', gguf_remedy=remedy)}")


def _show_size(folder: Path) -> str:
    """Of all weights, where their index says it."""
    try:
        size = json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))["metadata"]["total_size"]
        return f", {size / 2**30:.1f} GiB in all"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _explain(error: Exception, name: str, revision: str) -> ModelError:
    """What the hub's exceptions mean to whoever named the model; their own first line is a status code."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return ModelError(
            f"model.name={name}: is gated on the hub; accept its terms there and set HF_TOKEN to a token of that account"
        )
    if isinstance(error, RepositoryNotFoundError):
        return ModelError(
            f"model.name={name}: no such folder, and the hub has no such model, or none that HF_TOKEN may read"
        )
    if isinstance(error, RevisionNotFoundError):
        return ModelError(f"model.revision={revision}: the hub's {name} has no such branch, tag or commit")
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return ModelError(
            f"model.name={name}: no such folder, not in this machine's cache of the hub, and the hub cannot be asked"
            f" ({first_line(error.__cause__ or error)})"
        )
    return ModelError(f"model.name={name}: cannot be fetched from the hub ({first_line(error)})")


def _check_id(name: str) -> None:
    if Path(name).expanduser().is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise ModelError(f"model.name={name}: no such folder, and not a hub id of the form owner/name")
