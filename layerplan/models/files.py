"""Files of a model: found in a folder or fetched from the hub, read and hashed without loading a weight."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from layerplan.artifacts import compute_sha256, hash_files
from layerplan.errors import ModelError, first_line
from layerplan.models.gguf_file import SOURCE_NAME, read_source
from layerplan.models.own_types import make_known
from layerplan.models.weight_files import INDEX_NAME, OTHER_FORMATS, WEIGHTS_NAME, read_index
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.run_folder import CARD_NAME, PLAN_NAME, is_export

WEIGHT_SUFFIXES = (*OTHER_FORMATS, ".safetensors", ".onnx_data", ".tflite", ".ot", ".mlmodel", ".pkl", ".distcp")
OWN_FILES = (CARD_NAME, PLAN_NAME, SOURCE_NAME)
"""What an export says itself; the base's own card, plan and source are about another model."""

_OF_THE_WRITER = ("_name_or_path", "transformers_version")

TOKENIZER_SIBLINGS = ("tokenizer_config.json", "special_tokens_map.json", "config.json", "generation_config.json")
"""Files beside `tokenizer.json` that name its tokens; a model may lack any of them."""


def load_hf_config(name: str, *, revision: str = "main") -> dict[str, Any]:
    """Reads `config.json` of a folder or a hub id, without loading weights.

    Raises:
        ModelError: When the folder or its config is missing or malformed, or the hub cannot be reached.
    """
    path = find_model_file(name, "config.json", revision=revision)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"model.name={name}: {path} is not a readable config ({error})") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelError(f"model.name={name}: {path} has no model_type")
    make_known(config["model_type"])
    return config


def find_model_file(name: str, filename: str, *, revision: str = "main") -> Path:
    """Returns the local path of one file of a model; downloads it when `name` is a hub id.

    Raises:
        ModelError: When the folder lacks the file or the hub cannot give it.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / filename).is_file():
            raise ModelError(f"model.name={name}: the folder has no {filename}")
        return folder / filename
    _check_hub_id(name)
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return _fetch(name, filename, revision)
    except EntryNotFoundError as error:
        raise ModelError(f"model.name={name}: the hub has no {filename} ({first_line(error)})") from None


def is_at_hand(name: str, filename: str, *, revision: str = "main") -> bool:
    """Whether a file can be asked for without a network: a folder's always, a hub id's when the cache has it."""
    if Path(name).expanduser().is_dir() or name.count("/") != 1:
        return True
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, filename, revision=revision), str)


def _fetch(name: str, filename: str, revision: str) -> Path:
    """One file from the hub; raises the hub's own `EntryNotFoundError` when the model has no such file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(name, filename, revision=revision))
    except EntryNotFoundError:
        raise
    except Exception as error:
        raise ModelError(
            f"model.name={name}: {filename} cannot be fetched from the hub ({first_line(error)})"
        ) from None


def fetch_model_folder(name: str, *, revision: str = "main", with_weights: bool = False) -> Path:
    """The model's folder; for a hub id its snapshot, downloaded without weights, or with those transformers reads.

    Raises:
        ModelError: When there is no such folder, or the hub cannot give it.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    _check_hub_id(name)
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(name, revision=revision, ignore_patterns=[f"*{each}" for each in WEIGHT_SUFFIXES])
        )
        if with_weights:
            wanted = sorted(set(read_index(folder).values())) if (folder / INDEX_NAME).is_file() else [WEIGHTS_NAME]
            snapshot_download(name, revision=revision, allow_patterns=wanted)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"model.name={name}: cannot be fetched from the hub ({first_line(error)})") from None
    return folder


def list_companions(folder: Path) -> list[Path]:
    """Files that belong to a model beside its weights, relative to its folder: tokenizer, templates, code, licence.

    Left out are weights of every format with what lies in a subfolder of theirs, indices of weights, hidden files, and
    what an export writes itself.
    """
    found: list[Path] = []
    for where, folders, names in os.walk(folder):
        here = Path(where).relative_to(folder)
        holds_weights = any(name.lower().endswith(WEIGHT_SUFFIXES) for name in names)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        if holds_weights and here != Path():
            folders.clear()
            continue
        found += [here / name for name in sorted(names) if _is_companion(here, name)]
    return found


def _is_companion(here: Path, name: str) -> bool:
    is_ours = here == Path() and name in OWN_FILES
    return not (name.startswith(".") or is_ours or name.lower().endswith((*WEIGHT_SUFFIXES, ".index.json")))


def find_tokenizer_file(name: str, *, revision: str = "main") -> Path:
    """Returns the model's `tokenizer.json`; a hub id's lies beside what else the hub has of `TOKENIZER_SIBLINGS`.

    Raises:
        ModelError: When there is none.
    """
    path = find_model_file(name, "tokenizer.json", revision=revision)
    if not Path(name).expanduser().is_dir():
        _fetch_siblings(name, revision)
    return path


@lru_cache(maxsize=8)
def _fetch_siblings(name: str, revision: str) -> None:
    """Fetches `TOKENIZER_SIBLINGS`, as far as the hub has them; once in a process, as each asks the hub anew."""
    from huggingface_hub.errors import EntryNotFoundError

    for sibling in TOKENIZER_SIBLINGS:
        with suppress(EntryNotFoundError):
            _fetch(name, sibling, revision)


def identify_model(name: str, *, revision: str = "main") -> ModelIdentity:
    """Returns who the model is: config facts, and for folders the hash of the weight files, read anew when they changed.

    Raises:
        ModelError: When config or weights are missing.
    """
    return _identify(name, revision, list_changes(name, "*.safetensors", SOURCE_NAME))


def list_changes(name: str, *patterns: str) -> tuple[tuple[str, int, int], ...]:
    """What tells that files of a folder were replaced: their names, times and sizes; nothing for a hub id.

    A process that lives on, as a notebook's, must not take a folder for what it was.
    """
    folder = Path(name).expanduser()
    return stamp_files(sorted(path for pattern in patterns for path in folder.glob(pattern)) if folder.is_dir() else ())


def stamp_files(paths: Iterable[Path]) -> tuple[tuple[str, int, int], ...]:
    """Name, time and size of each file: what a reading that is kept in a process goes by."""
    return tuple((path.name, (stat := path.stat()).st_mtime_ns, stat.st_size) for path in paths)


@lru_cache(maxsize=8)
def _identify(name: str, revision: str, changes: tuple[tuple[str, int, int], ...]) -> ModelIdentity:
    config = load_hf_config(name, revision=revision)
    folder = Path(name).expanduser()
    weights = hash_weight_files(folder) if folder.is_dir() else None
    num_layers = count_layers(config)
    if num_layers < 1:
        raise ModelError(f"model.name={name}: config.json has no num_hidden_layers")
    return ModelIdentity(
        name=name_folder(folder) if folder.is_dir() else name,
        revision=revision,
        model_type=config["model_type"],
        num_layers=num_layers,
        weights_sha256=weights,
        source=read_source(folder),
    )


def hash_deciding_files(name: str, *, revision: str = "main", trust_remote_code: bool = False) -> dict[str, str]:
    """Hashes of what decides a model's numbers, by what it is: `config`, `weights` of a folder, `code` that may run.

    Of the config its values count, not how they are written nor which version of transformers wrote them.

    Raises:
        ModelError: When config or weights are missing.
    """
    folder = Path(name).expanduser()
    values = {key: value for key, value in load_hf_config(name, revision=revision).items() if key not in _OF_THE_WRITER}
    found = {"config": compute_sha256(values)}
    weights = identify_model(name, revision=revision).weights_sha256
    if weights is not None:
        found["weights"] = weights
    if trust_remote_code and folder.is_dir():
        found["code"] = hash_files(sorted(folder.glob("*.py")))
    return found


def count_layers(config: Mapping[str, Any]) -> int:
    """Decoder layers that a config gives, as its class reads it: under any name, in a text part or at the top; 0 for none."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        text = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config)).get_text_config(decoder=True)
        counts = [getattr(text, key, None) for key in ("num_layers", "num_hidden_layers")]
    except Exception:  # a class that transformers lacks, or values that the class does not take: said when it is loaded
        counts = [config.get("num_hidden_layers", config.get("n_layer"))]
    return next((count for count in counts if isinstance(count, int)), len(config.get("layers_block_type", ())))


def name_folder(folder: Path) -> str:
    """A model folder's name; an export of ours, `<run>/hf/step_X`, is named after its run: `<run>/step_X`."""
    folder = folder.resolve()
    return f"{folder.parent.parent.name}/{folder.name}" if is_export(folder) else folder.name


def hash_weight_files(folder: Path) -> str:
    """Hash over the names and bytes of a folder's safetensors; raises `ModelError` when it has none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"model.name={folder}: the folder has no *.safetensors weights")
    return hash_files(files)


def _check_hub_id(name: str) -> None:
    if Path(name).expanduser().is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise ModelError(f"model.name={name}: no such folder, and not a hub id of the form owner/name")
