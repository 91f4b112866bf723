"""Labels of Ray nodes that something may be placed on, in Ray's own syntax."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
_KEY = re.compile(rf"(?:[A-Za-z0-9.-]+/)?{_NAME}")
_VALUE = re.compile(rf"!?(?:{_NAME}|in\({_NAME}(?:, *{_NAME})*\))")


def _check(labels: dict[str, str]) -> dict[str, str]:
    for key, value in labels.items():
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is no key of a node's label, such as ray.io/accelerator-type or market")
        if not _VALUE.fullmatch(value):
            raise ValueError(f"{key}={value!r}: expected are VALUE, !VALUE, in(A,B) or !in(A,B)")
    return labels


NodeLabels = Annotated[dict[str, str], AfterValidator(_check)]
"""Key to what its value must be; a node has to satisfy all of them."""
