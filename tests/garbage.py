"""What may lie where a file of ours should."""

from __future__ import annotations

import pickle

GARBAGE = {
    "empty": b"",
    "zeros": bytes(64),
    "text": "今日は".encode(),
    "half a character": "今".encode()[:2],
    "cut pickle": pickle.dumps([1, 2, 3])[:-2],
    "list": b"[1, 2]",
    "number": b"7",
    "null": b"null",
    "deep": b"[" * 100_000,
    "huge number": b'{"step": 1' + b"0" * 5000 + b"}",
    "infinity": b'{"step": Infinity}',
    "wrong type": b'{"step": {"a": 1}, "plan_sha256": 3, "version": [], "layers": "x", "files": 1}',
    "wrong key": b'{"nonsense": true}',
    "no day": b'{"step": 2026-99-99}',
}
"""By what it is; none is a checkpoint, a plan, a profile, a manifest, a config or a result."""
