"""A finished run on the Hugging Face hub: its exported folder with the card and the plan, and what the run measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from layerplan.errors import ModelError, first_line
from layerplan.run_folder import (
    BASE,
    EXPORT_NAME,
    PLAN_TEXT_NAME,
    PROFILE_NAME,
    RESULT_NAME,
    SELF_TEST_NAME,
    VERDICTS_NAME,
    RunFolder,
    name_step,
)
from layerplan.train.request import load_result

RUN_FILES = (RESULT_NAME, EXPORT_NAME, VERDICTS_NAME, SELF_TEST_NAME, PROFILE_NAME, PLAN_TEXT_NAME)
RECORDS = "layerplan"
"""Folder of the repository for what is not part of the model."""


def list_pushed(run: Path) -> dict[str, Path]:
    """What a run gives to the hub: path in the repository, and the file.

    Raises:
        ModelError: When the run has not finished, or its export is not there.
    """
    result = load_result(run)
    if result is None or result.hf_dir is None:
        raise ModelError(f"{run}: has no training.json; only a finished run has a model to push")
    export = Path(result.hf_dir)
    if not (export / "config.json").exists():
        raise ModelError(f"{export}: the exported model is not there; submit the run again")
    pushed = {path.relative_to(export).as_posix(): path for path in sorted(export.rglob("*")) if path.is_file()}
    records = [run / name for name in RUN_FILES]
    pushed |= {f"{RECORDS}/{path.name}": path for path in records if path.exists()}
    for label in (BASE, name_step(result.final_step)):
        scores = sorted(RunFolder(run).scores_of(label).glob("*.json"))
        pushed |= {f"{RECORDS}/evaluation/{label}/{path.name}": path for path in scores}
    return pushed


def push(run: Path, repository: str, *, is_public: bool = False, token: str | None = None) -> str:
    """Uploads a finished run in one commit, to a repository that is made when it is not there.

    Args:
        run: The run's folder.
        repository: `owner/name`.
        is_public: Whether a repository that is made is one that everybody sees.
        token: Of the hub; that of `hf auth login` or HF_TOKEN when left out.

    Returns:
        The address of the commit.

    Raises:
        ModelError: When the run has nothing to push, or the hub does not take it.
    """
    files = list_pushed(run)
    return upload(files, repository, message=f"{run.name}, by layerplan", is_public=is_public, token=token)


def upload(files: Mapping[str, Path], repository: str, *, message: str, is_public: bool, token: str | None) -> str:
    """One commit of files; raises `ModelError` in the hub's own words."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path)) for name, path in files.items()]
    try:
        api.create_repo(repository, private=not is_public, exist_ok=True)
        done = api.create_commit(repository, operations, commit_message=message)
    except Exception as error:  # the client's own errors and those of the connection below it
        raise ModelError(f"{repository}: the hub did not take it ({first_line(error)})") from None
    return str(done.commit_url)


def describe(files: Mapping[str, Path]) -> str:
    """What would be pushed, a line a file."""
    sizes = {name: path.stat().st_size for name, path in files.items()}
    lines = [f"{size / 1e6:>10,.2f} MB  {name}" for name, size in sizes.items()]
    return "\n".join([*lines, f"{sum(sizes.values()) / 1e6:>10,.2f} MB  in {len(sizes)} files"])
