"""A compose file read as Docker reads it, so far as ours goes, to start what it says without Docker."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


class NotSetError(Exception):
    """A variable that the file insists on is not set."""


@dataclass(frozen=True)
class Service:
    """One service."""

    image: str
    command: tuple[str, ...]
    environment: dict[str, str]
    health: tuple[str, ...]
    """Command that says whether it is well; empty where there is none."""
    given: dict[str, Any]
    """All that stands there, as it was read."""


def read_services(path: Path, variables: Mapping[str, str]) -> dict[str, Service]:
    """The services of a file whose `${NAME:-default}` and `${NAME:?reason}` are replaced.

    Raises:
        NotSetError: When a variable with a reason is missing or empty.
    """
    services = replace(yaml.safe_load(path.read_text(encoding="utf-8")), variables)["services"]
    return {
        name: Service(
            given["image"],
            tuple(given.get("command", ())),
            given.get("environment", {}),
            tuple(given.get("healthcheck", {}).get("test", ())[1:]),
            given,
        )
        for name, given in services.items()
    }


def replace(value: Any, variables: Mapping[str, str]) -> Any:
    """The same with its variables replaced."""
    if isinstance(value, dict):
        return {key: replace(each, variables) for key, each in value.items()}
    if isinstance(value, list):
        return [replace(each, variables) for each in value]
    return VARIABLE.sub(lambda match: _get(match, variables), value) if isinstance(value, str) else value


def _get(match: re.Match[str], variables: Mapping[str, str]) -> str:
    name, kind, rest = match.groups()
    if value := variables.get(name):
        return value
    if kind == "?":
        raise NotSetError(f"{name}: {rest}")
    return rest or ""
