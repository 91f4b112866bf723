"""The strict base of every config: unknown keys are errors, values are frozen, docstrings become descriptions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

BRANCH = "·"
"""Begins the tags of unions that no field of the user tells apart; pydantic puts a tag into the path of a fault."""

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
"""What names a folder: of a run, and of a text within it."""


class StrictModel(BaseModel):
    """A frozen pydantic model that refuses unknown keys and documents each field where it is declared."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        protected_namespaces=(),
    )

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with some fields changed; raises `TypeError` for one that there is not, which pydantic would take."""
        unknown = [name for name in update or () if name not in type(self).model_fields]
        if unknown:
            raise TypeError(f"{type(self).__name__} has no field {unknown[0]!r}")
        return super().model_copy(update=update, deep=deep)


def describe_fault(error: ValidationError) -> str:
    """The first fault of a file that is no such model, in one line."""
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in fault["loc"])
    message = " ".join(str(fault["msg"]).removeprefix("Value error, ").split())[:200]
    return f"{where[:100]}: {message}" if where else message
