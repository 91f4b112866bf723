"""Copies the pages of the site and what they link to, in the layout of the repository: `python docs/site/stage.py OUT`.

MkDocs wants all pages below one folder, and ours lie where a reader of the repository looks for them.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "mkdocs.yml"
_LINK = re.compile(r"\]\(([^)#\s]+)")


def list_pages(config: Path = CONFIG) -> list[str]:
    """Paths of the pages that the navigation names, in its order."""
    return list(_iter_pages(yaml.safe_load(config.read_text(encoding="utf-8"))["nav"]))


def stage(out: Path) -> None:
    """Makes the folder anew from the pages and the files they link to."""
    shutil.rmtree(out, ignore_errors=True)
    pages = list_pages()
    for name in dict.fromkeys([*pages, *(link for page in pages for link in _list_links(page))]):
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)


def _iter_pages(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    else:
        for child in node.values() if isinstance(node, dict) else node:
            yield from _iter_pages(child)


def _list_links(page: str) -> list[str]:
    """Files of the repository that a page links to, beside other pages."""
    path = ROOT / page
    found = [(path.parent / link).resolve() for link in _LINK.findall(path.read_text(encoding="utf-8"))]
    return [str(file.relative_to(ROOT)) for file in found if file.is_file() and file.suffix != ".md"]


if __name__ == "__main__":
    stage(Path(sys.argv[1]))
