"""One way to hash a value: sha256 over its canonical JSON (sorted keys, no spaces, UTF-8)."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def compute_sha256(value: Any) -> str:
    """Hashes a JSON-serialisable value; equal values give equal hashes on every machine."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
