"""Keeps back what engines write to a command's standard error that nobody who runs it can act on.

Two roads lead there. What Ray forwards from its workers is printed by this process, so the stream is wrapped. What Ray's own
C++ code writes in this process goes past Python to descriptor 2, which leads through a `grep` meanwhile: a process of its
own, so that the last words of a crash arrive too.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

NOISE = (
    "core_worker\\.cc:[0-9]+: Actor with class name: .* has constructor arguments in the object store",
    "Task MapWorker\\(.*\\)\\.submit failed\\..* killed by `ray\\.kill`",  # by Ray Data itself, when no more rows are wanted
    "PYTHON worker processes have been started",
    "NUMA binding",
    "Triton is installed",
    "Setting up process group for",
    "Failed to query Ray Train Controller actor state",  # once a second where Ray's dashboard has died; training needs none
)
"""Written for both Python's `re` and `grep -E`."""
_NOISE = re.compile("|".join(NOISE))
_FORWARDED = re.compile(r"^(?:\x1b\[\d+m)?\(([^()]*)\)(?:\x1b\[0m)? (\{.*\})$")
_END_S = 1.0


def calm(line: str) -> str | None:
    """A line as it is shown: None for noise; a JSON line of a worker without Ray's mark, which moves into it."""
    if _NOISE.search(line):
        return None
    forwarded = _FORWARDED.match(line)
    if forwarded is None:
        return line
    with contextlib.suppress(ValueError):
        return json.dumps({**json.loads(forwarded[2]), "process": forwarded[1]}, ensure_ascii=False)
    return line


class CalmStream:
    """A text stream that shows whole lines as `change` returns them; what is flushed before its end is shown as it is."""

    def __init__(self, stream: IO[str], change: Callable[[str], str | None] = calm) -> None:
        self._stream = stream
        self._change = change
        self._held = ""
        self._lock = threading.RLock()

    def write(self, text: str) -> int:
        """Shows every line that has come to its end."""
        with self._lock:
            *lines, self._held = (self._held + text).split("\n")
            shown = [kept for kept in map(self._change, lines) if kept is not None]
            if shown:
                self._stream.write("\n".join(shown) + "\n")
        return len(text)

    def flush(self) -> None:
        """Shows what is held too, as a bar that redraws its line needs it."""
        with self._lock:
            if self._held:
                self._stream.write(self._held)
                self._held = ""
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def calm_engines() -> Iterator[None]:
    """Keeps noise back within the block; a stream that is not this process's own standard error is left alone."""
    grep = shutil.which("grep")
    if grep is None or not _is_own_stream(sys.stderr):
        yield
        return
    stream, screen = sys.stderr, os.dup(2)
    process = subprocess.Popen(
        [grep, "--line-buffered", "-a", "-v", "-E", "|".join(NOISE)],
        stdin=subprocess.PIPE,
        stdout=screen,
        start_new_session=True,  # Ctrl-C ends the command, and this with it
    )
    assert process.stdin is not None
    stream.flush()
    os.dup2(process.stdin.fileno(), 2)
    process.stdin.close()
    with os.fdopen(screen, "w", buffering=1, encoding=stream.encoding, errors="backslashreplace") as direct:
        sys.stderr = CalmStream(direct)
        try:
            yield
        finally:
            sys.stderr.flush()
            sys.stderr = stream
            os.dup2(screen, 2)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)


def _is_own_stream(stream: IO[str]) -> bool:
    try:
        return stream.fileno() == 2
    except (OSError, ValueError, AttributeError):
        return False
