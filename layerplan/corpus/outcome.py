"""What becomes of a document: the names under which a build and a stream count it."""

from __future__ import annotations

KEPT, FILTERED, CONTAMINATED, QUARANTINED = "kept", "filtered", "contaminated", "quarantined"
