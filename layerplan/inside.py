"""Names and paths that stand in data: they lead to files of their own folder and nowhere else."""

from __future__ import annotations

from pathlib import Path


def is_plain_name(name: object) -> bool:
    """Whether a name from a file is one in a folder, and leads nowhere else."""
    return isinstance(name, str) and name not in ("", ".", "..") and not {"/", "\\", "\0"} & set(name)


def leads_inside(path: object) -> bool:
    """Whether a path from a file, `name` or `folder/name`, stays below the folder it is relative to.

    It is looked at as text, so that it holds for addresses too and for the links that the hub's cache consists of.
    """
    return isinstance(path, str) and all(is_plain_name(part) for part in path.split("/"))


def lies_inside(path: Path, folder: Path) -> bool:
    """Whether a path, links followed, lies in the folder."""
    return path.resolve().is_relative_to(folder.resolve())
