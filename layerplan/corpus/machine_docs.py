"""`machine://`: text every Python machine already has, so that a first run needs no download.

`machine://docs` has three kinds, in a fixed order: the language reference's topic texts, the docstrings of the standard
library, and the README that installed packages carry in their metadata. `machine://catalogues/<language>` are the message
catalogues that installed packages have for a language, such as `zh_CN`.
"""

from __future__ import annotations

import ast
import importlib.metadata
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from layerplan.corpus.catalogues import find_catalogues, read_catalogues
from layerplan.errors import CorpusError

MACHINE_DOCS = "machine://docs"
PYTHON_DOCS, PACKAGE_DOCS = "machine://docs/python", "machine://docs/packages"
ALL_MACHINE_DOCS = (MACHINE_DOCS, PYTHON_DOCS, PACKAGE_DOCS)
CATALOGUES = "machine://catalogues/"
TOPICS, STDLIB, PACKAGE, CATALOGUE = "topics", "stdlib:", "package:", "catalogue:"


def is_machine_source(path: str) -> bool:
    """Whether a source's path means text of this machine."""
    return path in ALL_MACHINE_DOCS or path.startswith(CATALOGUES)


def iter_machine_units(source: str = MACHINE_DOCS) -> Iterator[str]:
    """Names the units: `topics`, `stdlib:<file>`, `package:<name>`, `catalogue:<language>`; of the source's kinds only.

    Raises:
        CorpusError: When no package has catalogues for the language.
    """
    if source.startswith(CATALOGUES):
        language = source.removeprefix(CATALOGUES)
        if not find_catalogues(language):
            raise CorpusError(
                f"corpus.sources: {source}: no installed package has message catalogues for {language!r}; a language such"
                " as zh_CN, de or ru is expected, and a package with translations, such as pycountry"
            )
        yield CATALOGUE + language
        return
    if source != PACKAGE_DOCS:
        yield from _iter_python_units()
    if source != PYTHON_DOCS:
        names = {distribution.metadata["Name"] or "" for distribution in importlib.metadata.distributions()}
        yield from (PACKAGE + name for name in sorted(names) if name)


def _iter_python_units() -> Iterator[str]:
    yield TOPICS
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        inner = path.relative_to(root).as_posix()
        if not inner.startswith(("site-packages/", "test/", "idlelib/", "lib2to3/", "config-")):
            yield STDLIB + inner


def read_machine_unit(name: str) -> Iterator[tuple[str, str]]:
    """Yields (document id, text) pairs of one unit; a module that cannot be parsed has no documentation."""
    if name == TOPICS:
        yield from _read_topics()
    elif name.startswith(STDLIB):
        yield from _read_docstrings(name.removeprefix(STDLIB))
    elif name.startswith(CATALOGUE):
        yield from read_catalogues(name.removeprefix(CATALOGUE))
    else:
        yield from _read_package(name.removeprefix(PACKAGE))


def _read_topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for key in sorted(topics):
        yield f"topics:{key}", topics[key]


def _read_docstrings(inner: str) -> Iterator[tuple[str, str]]:
    path = Path(sysconfig.get_paths()["stdlib"]) / inner
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [
        (getattr(node, "name", inner), ast.get_docstring(node))
        for node in ast.walk(tree)
        if isinstance(node, documented)
    ]
    text = "\n\n".join(f"{title}\n{docstring}" for title, docstring in found if docstring)
    if text:
        yield f"stdlib:{inner}", text


def _read_package(name: str) -> Iterator[tuple[str, str]]:
    try:
        metadata = importlib.metadata.metadata(name)
    except importlib.metadata.PackageNotFoundError:
        return
    fields = metadata.json
    text = str(fields.get("description", ""))
    if text:
        yield f"package:{name}", text
