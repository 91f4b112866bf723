"""YAML or JSON file plus `--set key.path=value` overrides to one validated `RunConfig`, and back to a file.

Every fault is reported in one go, one line each: the field's full path, the value given, and what is allowed.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from layerplan.config.run import RunConfig
from layerplan.errors import ConfigError
from layerplan.redaction import find_hidden, redact_text, redact_values


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a config file, applies `key.path=value` overrides and validates the whole.

    Args:
        path: YAML or JSON file; a `resolved_config.json` of an earlier run is accepted.
        overrides: `key.path=value` items; the value is read as YAML.

    Raises:
        ConfigError: With one line per fault.
    """
    values = _read_mapping(Path(path))
    for override in overrides:
        _apply_override(values, override)
    config = validate_config(values)
    _refuse_hidden(config)
    return config


def validate_config(values: Mapping[str, Any]) -> RunConfig:
    """Validates a plain mapping; raises `ConfigError` with one line per fault."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(*_describe_faults(error)) from None


def dump_config(config: RunConfig) -> str:
    """Renders every resolved value as JSON that `load_config` accepts, but for credentials: those are hidden."""
    return json.dumps(redact_values(config.model_dump(mode="json")), indent=2, ensure_ascii=False) + "\n"


def _refuse_hidden(config: RunConfig) -> None:
    """A config that was written without its credentials must get them again before anything asks with `***`."""
    hidden = list(find_hidden(config.model_dump(mode="json")))
    if hidden:
        raise ConfigError(
            *(
                f"{path}={uri}: its credentials were not written down; give it again with --set {path}=..."
                for path, uri in hidden
            )
        )


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: cannot be read ({error}); a YAML or JSON file is expected") from None
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        where = redact_text(" ".join(str(error).split()))[:300]
        raise ConfigError(f"--config {path}: not valid YAML ({where})") from None
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path}: holds {type(values).__name__}, a mapping of fields is expected")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(f"--set {redact_text(override)}: expected key.path=value, for example train.max_steps=100")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {redact_text(override)}: the value is not valid YAML") from None
    node: Any = values
    for position, part in enumerate(parts[:-1]):
        node = _descend(node, part, ".".join(parts[: position + 1]), override)
    if isinstance(node, list):
        node[_list_index(node, parts[-1], override)] = value
    else:
        node[parts[-1]] = value


def _descend(node: Any, part: str, so_far: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_list_index(node, part, override)]
    child = node.setdefault(part, {})
    if child is None:
        child = node[part] = {}
    if not isinstance(child, dict | list):
        raise ConfigError(redact_text(f"--set {override}: {so_far} is {child!r}, it has no fields of its own"))
    return child


def _list_index(items: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise ConfigError(f"--set {redact_text(override)}: {part!r} is not an index of a list of {len(items)} items")
    return int(part)


def _describe_faults(error: ValidationError) -> list[str]:
    return [_describe_fault(fault) for fault in error.errors()]


def _describe_fault(fault: Any) -> str:
    path = [str(part) for part in fault["loc"]]
    field = ".".join(_without_union_tags(fault["loc"])) or "config"
    if fault["type"] == "extra_forbidden":
        allowed = _fields_beside(path)
        near = difflib.get_close_matches(path[-1], allowed, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{field}: unknown key; {hint}allowed: {', '.join(allowed)}" if allowed else f"{field}: unknown key"
    message = str(fault["msg"]).removeprefix("Value error, ")
    given = fault.get("input")
    shown = "" if isinstance(given, Mapping | BaseModel) else redact_text(f" (got {given!r})")
    if fault["type"] == "missing":
        return f"{field}: is required"
    return f"{field}: {message}{shown}"


def _without_union_tags(location: Sequence[str | int]) -> list[str]:
    """The path as the user wrote it: pydantic puts the `type` of a union member into it (`plan.full.x`)."""
    unions = [name for name, field in RunConfig.model_fields.items() if field.discriminator]
    parts = [str(part) for part in location]
    return parts[:1] + parts[2:] if len(parts) > 2 and parts[0] in unions else parts


def _fields_beside(path: Sequence[str]) -> list[str]:
    """Names of the fields allowed where the unknown key at `path` stood."""
    schema = RunConfig.model_json_schema()
    definitions = schema.get("$defs", {})
    node: dict[str, Any] = schema
    for part in path[:-1]:
        node = _step_into(node, part, definitions)
    return sorted(node.get("properties", {}))


def _step_into(node: dict[str, Any], part: str, definitions: Mapping[str, Any]) -> dict[str, Any]:
    child = node.get("properties", {}).get(part)
    if child is None and "mapping" in node.get("discriminator", {}):
        child = {"$ref": node["discriminator"]["mapping"].get(part, "")}
    if child is None:
        child = node.get("items", node)
    while "$ref" in child or "anyOf" in child:
        if "$ref" in child:
            child = definitions.get(child["$ref"].rsplit("/", 1)[-1], {})
        else:
            child = next((option for option in child["anyOf"] if "$ref" in option), {})
    return child
