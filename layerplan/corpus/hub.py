"""`hub://owner/dataset`: a Hugging Face data set by id, streamed.

The `datasets` library resolves the id, subset and split to files at one commit, by the data set's own card and layout;
our readers then stream those files with byte ranges, so that a bad line costs one line there too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from layerplan.config.corpus import SourceConfig
from layerplan.corpus.file_table import FileTable
from layerplan.corpus.location import list_files
from layerplan.errors import CorpusError
from layerplan.storage.address import open_filesystem

HUB = "hub://"
CONVERTED = "refs/convert/parquet"
"""Branch in which the hub keeps Parquet files of a data set that is a loading script, which `datasets` no longer runs."""
_PARTIAL = re.compile(r"/partial-[^/]+/[^/]+\.parquet$")
"""Files of a split of which the hub converted the first 5 GB alone, as its dataset viewer's documentation has it."""


def list_hub_files(source: SourceConfig) -> FileTable:
    """Files of the data set's split, in the data set's order.

    `hub://` with an absolute path reads a folder in the hub's layout, such as a snapshot on disk.

    Raises:
        CorpusError: When the hub cannot be reached, access is not granted, or there is no such split.
    """
    name = source.path.removeprefix(HUB)
    try:
        from datasets import load_dataset_builder

        revision = None if _is_local(name) else source.revision
        builder = load_dataset_builder(name, **choose_subset(name, source.subset, revision), revision=revision)
    except CorpusError as error:
        raise CorpusError(f"{source.path}: {error}") from None
    except Exception as error:
        remedy = (
            f"set revision: {CONVERTED}, the hub's own conversion, where it has one"
            if "scripts" in str(error)
            else "check the id, subset and revision, the network (HF_HUB_OFFLINE must not be 1), and for a gated data set"
            " accept its terms and set HF_TOKEN"
        )
        raise CorpusError(
            f"{source.path}: cannot be read from the hub ({type(error).__name__}: {_shorten(error)}); {remedy}"
        ) from None
    splits = builder.config.data_files or {}
    if source.split not in splits:
        have = ", ".join(map(str, splits)) or "none that is made of files"
        raise CorpusError(f"{source.path}: has no split {source.split!r}; it has {have}")
    return FileTable.collect(file for path in splits[source.split] for file in _find_size(str(path)))


def choose_subset(name: str, subset: str | None, branch: str | None) -> dict[str, str | None]:
    """How `datasets` is told of a subset: by its name, or by its folder in the hub's own conversion.

    That branch has a folder for every subset and no card, so that `datasets` takes all of them for one and knows no name.

    Raises:
        CorpusError: When the conversion has several subsets and none is chosen, or has no such one.
    """
    if branch != CONVERTED:
        return {"name": subset}
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFolder

    found = HfApi().list_repo_tree(name, repo_type="dataset", revision=branch)
    folders = sorted(entry.path for entry in found if isinstance(entry, RepoFolder))
    chosen = subset or (folders[0] if len(folders) == 1 else "default")
    if chosen not in folders:
        wrong = "has several subsets" if subset is None else f"has no subset {subset!r}"
        raise CorpusError(f"the hub's conversion {wrong}; set subset to one of {', '.join(folders)}")
    return {"data_dir": chosen}


def explain_partial(files: FileTable) -> str | None:
    """A line where the hub converted the beginning of a split alone, else None."""
    if not any(map(_PARTIAL.search, files.iter_paths())):
        return None
    return "is a part of the split: the hub converts the first 5 GB of a large one and no more"


def _is_local(name: str) -> bool:
    return Path(name).is_dir()


def _find_size(path: str) -> Iterator[tuple[str, int]]:
    if path.startswith("hf://"):
        filesystem, inner = open_filesystem(path)
        yield path, filesystem.get_file_info(inner).size or 0
    else:
        files = list_files(path)
        yield from zip(files.iter_paths(), files.sizes.tolist(), strict=True)


def _shorten(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
