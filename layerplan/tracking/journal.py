"""Files of lines that are only appended to, and a reader that carries on where it was.

Every line is a JSON object with `time`, milliseconds since 1970 that grow strictly within a file. So a time is also the
number of a line: who has handled everything up to one knows what is left, even after a resume has written the file anew.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from layerplan.artifacts import parse_lines, read_lines

CHUNK_BYTES = 1 << 20
CHUNK_LINES = 200
"""What a reader holds in memory at once, however far behind it is."""

Line = dict[str, Any]


class Journal:
    """Appends lines; what a killed writer left of its last one is taken off."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        end_with_a_line(path)
        self._last = max((time_of(line) for line in read_lines(path)), default=0)

    def append(self, line: Mapping[str, Any]) -> None:
        """Writes one line and gives it its time; a clock that went back is not followed."""
        self._last = max(self._last + 1, int(time.time() * 1000))
        with self._path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({**line, "time": self._last}, ensure_ascii=False) + "\n")


class LineReader:
    """Reads a file that grows, in bounded pieces; a file that was written anew is read from its beginning."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._before = b""
        """The line before the offset: while it stands there, the file is the one that was read."""
        self._ahead = b""

    def peek(self, wanted: Callable[[Line], bool]) -> list[Line]:
        """The wanted lines of the next piece that has any; the same again until `advance`."""
        while self._ahead or self._read():
            found = [line for line in parse_lines(self._ahead) if wanted(line)]
            if found:
                return found
            self.advance()
        return []

    def advance(self) -> None:
        """Leaves behind what `peek` returned."""
        self._offset += len(self._ahead)
        self._before = self._ahead.splitlines(keepends=True)[-1] if self._ahead else self._before
        self._ahead = b""

    def forget(self) -> None:
        """Reads what `peek` returned anew the next time, since the file may have been written anew meanwhile."""
        self._ahead = b""

    def rewind(self) -> None:
        """Starts at the beginning."""
        self._offset, self._before, self._ahead = 0, b"", b""

    def _read(self) -> bytes:
        try:
            with self._path.open("rb") as handle:
                handle.seek(self._offset - len(self._before))
                if handle.read(len(self._before)) != self._before:
                    self._offset, self._before = 0, b""
                    handle.seek(0)
                piece = handle.read(CHUNK_BYTES)
                if b"\n" not in piece:
                    piece += handle.readline()
        except FileNotFoundError:
            self.rewind()
            return b""
        whole = piece[: piece.rfind(b"\n") + 1]
        self._ahead = b"".join(whole.splitlines(keepends=True)[:CHUNK_LINES])
        return self._ahead


def time_of(line: Line) -> int:
    """The time of a line; 0 for one written before lines had a time."""
    return int(line.get("time", 0))


def end_with_a_line(path: Path) -> None:
    """Takes off what follows the last line break."""
    if not path.exists():
        return
    with path.open("rb+") as handle:
        content = handle.read()
        handle.truncate(content.rfind(b"\n") + 1)
