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

from layerplan.config.base import BRANCH, NAME_PATTERN
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
    config = validate_config(apply_overrides(_read_mapping(Path(path)), overrides))
    _refuse_hidden(config)
    return config


def apply_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Sets `key.path=value` items in a plain mapping and returns it; raises `ConfigError` naming a malformed one."""
    for override in overrides:
        _apply_override(values, override)
    return values


def validate_config(values: Mapping[str, Any]) -> RunConfig:
    """Validates a plain mapping; raises `ConfigError` with one line per fault."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(*_describe_faults(error)) from None


def dump_config(config: RunConfig) -> str:
    """Renders every resolved value as JSON that `load_config` accepts, but for credentials: those are hidden."""
    return json.dumps(redact_values(config.model_dump(mode="json")), indent=2, ensure_ascii=False) + "\n"


def flatten_values(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping of dotted paths; lists stay whole."""
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, child in value.items():
        flat.update(flatten_values(child, f"{prefix}.{key}" if prefix else key))
    return flat


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
    parts, node = _resolve(fault["loc"])
    field = ".".join(parts) or "config"
    given = fault.get("input")
    match fault["type"]:
        case "extra_forbidden":
            allowed = sorted(node.get("properties", {}))
            if not allowed:
                return f"{field}: unknown key"
            return f"{field}: unknown key; {_suggest(parts[-1], allowed)}allowed: {', '.join(allowed)}"
        case "missing":
            return f"{field}: is required"
        case "union_tag_not_found":
            kinds = _list_kinds(node)
            return f"{field}.type: is required; allowed: {', '.join(kinds)}" if kinds else f"{field}: {fault['msg']}"
        case "union_tag_invalid":
            kinds, kind = _list_kinds(node), str(fault["ctx"]["tag"])
            return f"{field}.type: {kind!r} is unknown; {_suggest(kind, kinds)}allowed: {', '.join(kinds)}"
        case "model_attributes_type" | "model_type" | "dict_type":
            such = f", {{type: {given}}}" if given in _list_kinds(node) else ""
            return f"{field}: a mapping of fields is expected{such}{redact_text(f' (got {given!r})')}"
        case "string_pattern_mismatch" if fault["ctx"]["pattern"] == NAME_PATTERN:
            rule = "letters A to Z in either case, digits, '.', '-' and '_' are allowed, a letter or digit first"
            return f"{field}: {rule}{redact_text(f' (got {given!r})')}"
    message = str(fault["msg"]).removeprefix("Value error, ")
    shown = "" if isinstance(given, Mapping | BaseModel) else redact_text(f" (got {given!r})")
    return f"{field}: {message}{shown}"


def _suggest(word: str, allowed: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, allowed, n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def _list_kinds(node: Mapping[str, Any]) -> list[str]:
    return sorted(node.get("discriminator", {}).get("mapping", {}))


def _resolve(location: Sequence[str | int]) -> tuple[list[str], dict[str, Any]]:
    """The path as the user wrote it, and the schema of what holds its last part.

    Pydantic puts the `type` of a union's member into the path (`plan.full.x`), at every depth.

    Returns:
        Path and schema; of a union whose member is not known, the union's own.
    """
    schema = RunConfig.model_json_schema()
    definitions = schema.get("$defs", {})
    holder = node = schema
    parts = []
    for part in map(str, location):
        if part.startswith(BRANCH):
            continue
        if part not in node.get("properties", {}) and part in node.get("discriminator", {}).get("mapping", {}):
            node = _step_into(node, part, definitions)
            continue
        parts.append(part)
        holder, node = node, _step_into(node, part, definitions)
    return parts, node if "discriminator" in node else holder


def _step_into(node: dict[str, Any], part: str, definitions: Mapping[str, Any]) -> dict[str, Any]:
    child = node.get("properties", {}).get(part)
    if child is None and "mapping" in node.get("discriminator", {}):
        child = {"$ref": node["discriminator"]["mapping"].get(part, "")}
    if child is None:
        child = node.get("items", node)
    while "$ref" in child or (options := child.get("anyOf", [] if "discriminator" in child else child.get("oneOf"))):
        if "$ref" in child:
            child = definitions.get(child["$ref"].rsplit("/", 1)[-1], {})
        else:
            child = next((option for option in options if "$ref" in option), {})
    return child
