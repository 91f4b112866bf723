"""`machine://docs`: the documentation every Python machine already has, so that a first run needs no download.

Three kinds, in a fixed order: the language reference's topic texts, the docstrings of the standard library, and the
README that installed packages carry in their metadata.
"""

from __future__ import annotations

import ast
import importlib.metadata
import sysconfig
from collections.abc import Iterator
from pathlib import Path

MACHINE_DOCS = "machine://docs"
PYTHON_DOCS, PACKAGE_DOCS = "machine://docs/python", "machine://docs/packages"
ALL_MACHINE_DOCS = (MACHINE_DOCS, PYTHON_DOCS, PACKAGE_DOCS)
TOPICS, STDLIB, PACKAGE = "topics", "stdlib:", "package:"


def iter_machine_units(source: str = MACHINE_DOCS) -> Iterator[str]:
    """Names the units: `topics`, `stdlib:<file>`, `package:<name>`; a narrower source names its own kinds only."""
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
