"""The reference of every config field, from the fields: `python -m layerplan.config.reference > docs/configuration.md`."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from layerplan.config.run import RunConfig

HEADER = """# Configuration

Made by `python -m layerplan.config.reference` from the docstrings of `layerplan/config/`; a test keeps it current.

A run is one YAML file, `--config FILE.yaml`, plus any number of `--set key.path=value`; a value is YAML too, so
`--set plan='{type: freeze_deep, boundary: 9}'` replaces a whole section. Unknown keys and values out of range are refused with
one line each (exit status 2). The resolved config is written beside the run as `resolved_config.json`, and `--config` accepts it.
"""


def render_reference() -> str:
    """Returns the Markdown of all sections, each model once, in the order a run config names them."""
    return "\n".join([HEADER, *(_render_model(model) for model in _iter_models(RunConfig, set()))])


def _iter_models(model: type[BaseModel], seen: set[type[BaseModel]]) -> Iterator[type[BaseModel]]:
    if model in seen:
        return
    seen.add(model)
    yield model
    for field in model.model_fields.values():
        for inner in _models_in(field.annotation):
            yield from _iter_models(inner, seen)


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and not typing.get_args(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _models_in(part)


def _render_model(model: type[BaseModel]) -> str:
    summary = " ".join((model.__doc__ or "").split())
    rows = [_render_row(name, field) for name, field in model.model_fields.items()]
    table = ["| field | type | default | meaning |", "|---|---|---|---|", *rows]
    return "\n".join([f"## {model.__name__}", "", summary, "", *table, ""])


def _render_row(name: str, field: FieldInfo) -> str:
    limits = ", ".join(_limit(item) for item in field.metadata if _limit(item))
    kind = _type_name(field.annotation) + (f"; {limits}" if limits else "")
    meaning = " ".join((field.description or "").split())
    return f"| `{name}` | {_cell(kind)} | {_cell(_default(field))} | {_cell(meaning)} |"


def _limit(item: Any) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    return ", ".join(
        f"{sign} {getattr(item, key)}" for key, sign in signs.items() if getattr(item, key, None) is not None
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, BaseModel):
        return f"`{type(value).__name__}()`"
    if isinstance(value, list) and value and isinstance(value[0], BaseModel):
        return "see below"
    return "none" if value is None else f"`{value}`"


def _type_name(annotation: Any) -> str:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_name(parts[0])
    if origin is typing.Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if part is type(None) else _type_name(part) for part in parts)
    if origin in (list, tuple):
        return f"{origin.__name__} of {_type_name(parts[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    return getattr(annotation, "__name__", str(annotation))


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", text)


if __name__ == "__main__":
    print(render_reference())
