"""Files of a model: found in a folder or fetched from the hub, read and hashed without loading a weight."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from layerplan.artifacts import compute_sha256, hash_files
from layerplan.errors import ModelError
from layerplan.models import hub
from layerplan.models.gguf_file import SOURCE_NAME, read_source
from layerplan.models.own_types import make_known
from layerplan.plan.layer_profile import ModelIdentity
from layerplan.run_folder import CARD_NAME, PLAN_NAME, is_export

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
    return hub.fetch_file(name, filename, revision=revision)


def is_at_hand(name: str, filename: str, *, revision: str = "main") -> bool:
    """Whether a file can be asked for without a network: a folder's always, a hub id's when the cache has it."""
    if Path(name).expanduser().is_dir() or name.count("/") != 1:
        return True
    return hub.is_cached(name, filename, revision=revision)


def fetch_model_folder(name: str, *, revision: str = "main", with_weights: bool = False) -> Path:
    """The model's folder; for a hub id its snapshot, downloaded without weights, or with those transformers reads.

    Raises:
        ModelError: When there is no such folder, or the hub cannot give it.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    return hub.fetch_folder(name, revision=revision, with_weights=with_weights)


def find_commit(name: str, *, revision: str = "main") -> str | None:
    """The commit that a hub id's branch or tag stands at, as far as the hub can be reached; None for a folder.

    Raises:
        ModelError: When the hub has no such model or revision.
    """
    if Path(name).expanduser().is_dir():
        return None
    return find_model_file(name, "config.json", revision=revision).parent.name  # the cache has a folder per commit


def list_companions(folder: Path) -> list[Path]:
    """Files that belong to a model beside its weights, relative to its folder: tokenizer, templates, code, licence.

    Left out are weights of every format with what lies in a subfolder of theirs, indices of weights, hidden files, and
    what an export writes itself.
    """
    found: list[Path] = []
    for where, folders, names in os.walk(folder):
        here = Path(where).relative_to(folder)
        holds_weights = any(name.lower().endswith(hub.WEIGHT_SUFFIXES) for name in names)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        if holds_weights and here != Path():
            folders.clear()
            continue
        found += [here / name for name in sorted(names) if _is_companion(here, name)]
    return found


def _is_companion(here: Path, name: str) -> bool:
    is_ours = here == Path() and name in OWN_FILES
    return not (name.startswith(".") or is_ours or name.lower().endswith((*hub.WEIGHT_SUFFIXES, ".index.json")))


def find_tokenizer_file(name: str, *, revision: str = "main") -> Path:
    """Returns the model's `tokenizer.json`; a hub id's lies beside its other small files.

    Raises:
        ModelError: When there is none.
    """
    path = fetch_model_folder(name, revision=revision) / "tokenizer.json"
    if not path.is_file():
        raise ModelError(
            f"model.name={name}: has no tokenizer.json; of a tokenizer of another kind transformers can write one:"
            " AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)"
        )
    return path


def identify_model(name: str, *, revision: str = "main", with_weights: bool = True) -> ModelIdentity:
    """Returns who the model is: config facts and the hash of its weight files, read anew when they changed.

    Args:
        name: Folder or hub id.
        revision: Of a hub id.
        with_weights: Fetch a hub id's weights to hash them; a folder's are hashed in any case.

    Raises:
        ModelError: When config or weights are missing.
    """
    folder = Path(name).expanduser()
    weights: tuple[Path, ...] | None = None
    if folder.is_dir():
        weights = _list_weights(folder)
    elif with_weights:
        weights = hub.list_fetched_weights(hub.fetch_folder(name, revision=revision, with_weights=True)) or None
    return _identify(name, revision, weights, list_changes(name, "*.safetensors", SOURCE_NAME))


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
def _identify(
    name: str, revision: str, weights: tuple[Path, ...] | None, changes: tuple[tuple[str, int, int], ...]
) -> ModelIdentity:
    config = load_hf_config(name, revision=revision)
    folder = Path(name).expanduser()
    num_layers = count_layers(config)
    if num_layers < 1:
        raise ModelError(f"model.name={name}: config.json has no num_hidden_layers")
    return ModelIdentity(
        name=name_folder(folder) if folder.is_dir() else name,
        revision="main" if folder.is_dir() else revision,
        model_type=config["model_type"],
        num_layers=num_layers,
        weights_sha256=None if weights is None else hash_files(weights),
        source=read_source(folder),
    )


def hash_deciding_files(name: str, *, revision: str = "main", trust_remote_code: bool = False) -> dict[str, str]:
    """Hashes of what decides a model's numbers, by what it is: `config`, `weights`, `code` of a folder that may run.

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
    return hash_files(_list_weights(folder))


def _list_weights(folder: Path) -> tuple[Path, ...]:
    files = tuple(sorted(folder.glob("*.safetensors")))
    if not files:
        raise ModelError(f"model.name={folder}: the folder has no *.safetensors weights")
    return files
