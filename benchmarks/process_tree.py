"""CPU time and memory of a process and all below it, as a cluster on one machine is."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

import psutil

SAMPLE_EVERY_S = 10


@dataclass
class TreeMeter:
    """CPU seconds and peak memory of this process and all below it but those in `ignored`."""

    ignored: frozenset[int] = frozenset()
    peak_pss: int = 0
    names: dict[int, str] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)
    _cpu_s: dict[int, float] = field(default_factory=dict)
    _thread: threading.Thread | None = None

    def __enter__(self) -> TreeMeter:
        self._sample()
        self._before = dict(self._cpu_s)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        assert self._thread is not None
        self._thread.join()
        self._sample()

    @property
    def cpu_s(self) -> float:
        """CPU seconds since the start, of processes that ended in between up to their last sample."""
        return sum(seconds - self._before.get(pid, 0.0) for pid, seconds in self._cpu_s.items())

    def describe(self) -> dict[str, float]:
        """CPU seconds by the beginning of the command line, those that took a second or more."""
        parts: dict[str, float] = {}
        for pid, seconds in self._cpu_s.items():
            name = self.names.get(pid, "")
            parts[name] = round(parts.get(name, 0.0) + seconds - self._before.get(pid, 0.0), 1)
        return {name: seconds for name, seconds in sorted(parts.items()) if seconds >= 1}

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_EVERY_S):
            self._sample()

    def _sample(self) -> None:
        total = 0
        me = psutil.Process()
        for process in [me, *me.children(recursive=True)]:
            if process.pid in self.ignored:
                continue
            try:
                times = process.cpu_times()
                self._cpu_s[process.pid] = times.user + times.system
                self.names[process.pid] = describe_command(process.cmdline())
                total += process.memory_full_info().pss
            except psutil.Error:
                continue
        self.peak_pss = max(self.peak_pss, total)


def describe_command(words: list[str]) -> str:
    """What a process runs, without the folders of this machine."""
    return " ".join(Path(word).name for word in words[:2])[:40].strip()
