"""How the folder of one run is found and opened, and whether it may be continued; `layerplan/run_folder.py` has its names.

A run name belongs to one config. Submitting the same name again continues the run when nothing that decides its
numbers has changed; where it runs, how it is logged and how often it is saved may change freely, and a plan or a source
that was refused before anything was made by it may be mended.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from layerplan.artifacts import write_text
from layerplan.config.load import dump_config, flatten_values
from layerplan.config.run import RunConfig
from layerplan.errors import ConfigError
from layerplan.redaction import redact_values
from layerplan.run_folder import RunFolder
from layerplan.storage.working import SERVED, find_home, find_working_folder, is_remote

logger = logging.getLogger(__name__)

MAY_CHANGE = (
    "storage_path",
    "working_path",
    "cluster",
    "tracking",
    "sweep",
    "trace.num_actors",
    "trace.num_cpus_per_actor",
    "trace.num_gpus_per_actor",
    "trace.labels",
    "measure.num_actors",
    "measure.num_cpus_per_actor",
    "measure.num_gpus_per_actor",
    "measure.labels",
    "corpus.num_workers",
    "corpus.num_cpus_per_worker",
    "corpus.num_writers",
    "corpus.max_bad_fraction",
    "corpus.tokenizer_library",
    "corpus.end_of_text",
    "corpus.begin_token",
    "corpus.control_tokens",
    "train.num_workers",
    "train.num_cpus_per_worker",
    "train.use_gpu",
    "train.labels",
    "train.placement",
    "train.micro_batch_size",
    "train.frozen_sharding",
    "train.activation_checkpointing",
    "train.compile",
    "train.cache_prefix",
    "train.log_every_steps",
    "train.checkpoint_every_steps",
    "train.keep_checkpoints",
    "train.validate_every_steps",
    "train.max_failures",
    "train.stall_timeout",
    "train.export_dtype",
    "evaluation",
)
"""Fields that decide where and how a run is carried out, not what it computes; scores carry their own protocol id."""


_USES_OF_PLAN = ("plan", "sweep")
_USES_OF_TEXT = (*_USES_OF_PLAN, "manifest", "base_model", "measurements")
MAY_CHANGE_UNTIL = {"plan": _USES_OF_PLAN, "corpus.sources": _USES_OF_TEXT, "corpus.filters": _USES_OF_TEXT}
"""Fields, and the parts of a run folder that are made by them: without any of these no number depends on the fields yet."""

MAX_STEPS = "train.max_steps"

RAY_PACKAGES = {"runtime_resources", "working_dir_files"}
"""Folders on the way to where Ray unpacks what `ray job submit --working-dir` sent."""

_AWKWARD = re.compile(r"\?|%[0-9A-Fa-f]{2}|[\x00-\x1f\x7f\ud800-\udfff]")


def open_run_folder(config: RunConfig) -> RunFolder:
    """Creates or continues the run's folder and writes its resolved config.

    Raises:
        ConfigError: When the name is taken by a run with another config, or the folder cannot be written or has a name
            that cannot stand in an address.
    """
    folder = locate_run_folder(config)
    if is_remote(config.storage_path):
        folder = _open_mirror(folder)
    if folder.config.exists():
        _check_same_config(folder, config)
    try:
        write_text(folder.config, dump_config(config))
    except OSError as error:
        raise ConfigError(f"storage_path: {folder.root} cannot be written ({error})") from None
    folder.carry()
    return folder


def _open_mirror(folder: RunFolder) -> RunFolder:
    """The working folder with all that the bucket has of the run."""
    from layerplan.storage.mirror import Mirror

    mirror = Mirror(folder.root)
    mirror.fetch()
    logger.info("the run is kept at %s; this machine works in %s", find_home(folder.root), folder.root)
    return RunFolder(folder.root, mirror)


def open_named_run(run: str) -> RunFolder:
    """The folder of a run that somebody names by its path or its address, with all that is kept there."""
    if not is_remote(run):
        return RunFolder(Path(run).expanduser().resolve())
    return _open_mirror(RunFolder(find_working_folder(run, None)))


def fetch_run(run: str, *names: str) -> Path:
    """The same with these of its files or folders only, when it is an address."""
    if not is_remote(run):
        return Path(run)
    from layerplan.storage.mirror import fetch_file, fetch_folder

    root = find_working_folder(run, None)
    for name in names:
        fetch = fetch_file if Path(name).suffix else fetch_folder
        fetch(root / name)
    return root


def locate_run_folder(config: RunConfig) -> RunFolder:
    """Where the run's folder is or will be.

    Raises:
        ConfigError: When its scheme is not served, or it has a name that cannot stand in an address.
    """
    if is_remote(config.storage_path):
        base = find_working_folder(config.storage_path, config.working_path)
    else:
        _check_meant_as_path(config.storage_path)
        base = Path(config.storage_path).expanduser().resolve()
    folder = RunFolder(base / config.name)
    _check_characters(folder.root)
    _check_stays(config.storage_path, folder.root)
    return folder


def _check_characters(root: Path) -> None:
    """The lineage's database and artifacts lie at addresses made of this path, where these mean something else."""
    found = _AWKWARD.search(str(root))
    if found is not None:
        raise ConfigError(
            f"storage_path: {str(root)!r} has {found.group()!r}, which ends or changes an address that is made of it;"
            " choose a folder without question marks, percent escapes and control characters"
        )


def _check_meant_as_path(storage_path: str) -> None:
    """A folder would be made of whatever is named, and the run be looked for elsewhere."""
    if storage_path.startswith(tuple(f"{scheme}:/" for scheme in SERVED)):  # what `pathlib` makes of an address
        raise ConfigError(f"storage_path={storage_path}: an address has two slashes after its scheme")
    if re.search(r"\$(\w|\{)", storage_path):
        raise ConfigError(
            f"storage_path={storage_path}: variables are not replaced in a config; write the path, or `~`"
        )


def _check_stays(storage_path: str, root: Path) -> None:
    """Ray unpacks a job's working directory anew whenever a file in it changed, and throws old ones away."""
    if RAY_PACKAGES.issubset(root.parts):
        raise ConfigError(
            f"storage_path={storage_path}: lies in Ray's temporary copy of the job's working directory ({root}), where the next"
            " submission would not find the run; set it to an absolute path or an address"
        )


def _check_same_config(folder: RunFolder, config: RunConfig) -> None:
    try:
        earlier = flatten_values(redact_values(_fill_defaults(json.loads(folder.config.read_text(encoding="utf-8")))))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"name: {folder.config} of an earlier run cannot be read ({error}); choose another name"
        ) from None
    now = flatten_values(json.loads(dump_config(config)))
    free = (*MAY_CHANGE, *_list_unused(folder))
    changed = [
        key
        for key in sorted({*earlier, *now})
        if earlier.get(key) != now.get(key) and not _is_below(key, free) and key != MAX_STEPS
    ]
    faults = [
        f"name: run {config.name!r} exists with {key}={earlier.get(key)!r}, this config has {now.get(key)!r};"
        " choose another name (--set name=...) or the earlier value"
        for key in _leave_out_options(changed)
    ]
    faults += _check_max_steps(config, earlier.get(MAX_STEPS))
    if faults:
        raise ConfigError(*faults)


def _leave_out_options(changed: list[str]) -> list[str]:
    """Without the options of a section whose type is another, which has others."""
    kinds = tuple(key.removesuffix("type") for key in changed if key.endswith(".type"))
    return [key for key in changed if key.endswith(".type") or not key.startswith(kinds)]


def _check_max_steps(config: RunConfig, earlier: Any) -> list[str]:
    """A run may be given more steps, also when it is finished; what was trained is not taken back."""
    steps = config.train.max_steps
    if earlier is None or steps >= earlier:
        return []
    return [
        f"{MAX_STEPS}={steps}: run {config.name!r} was given {earlier} steps and can be given more, not fewer; choose"
        f" at least {earlier}, or another name"
    ]


def _fill_defaults(values: Any) -> Any:
    """A resolved config as this version writes it: fields it did not have yet are at their defaults."""
    try:
        return RunConfig.model_validate(values).model_dump(mode="json")
    except ValidationError:
        return values


def _list_unused(folder: RunFolder) -> list[str]:
    return [
        field for field, parts in MAY_CHANGE_UNTIL.items() if not any(getattr(folder, part).exists() for part in parts)
    ]


def _is_below(key: str, fields: Iterable[str]) -> bool:
    return any(key == field or key.startswith(field + ".") for field in fields)
