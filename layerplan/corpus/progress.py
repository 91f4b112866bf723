"""How far a build is: documents and tokens per second, and when it will be done."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

from layerplan.corpus.outcome import KEPT
from layerplan.corpus.unit import UnitTable
from layerplan.corpus.writer import StoreWriter
from layerplan.progress import Pace
from layerplan.progress_line import ProgressLine


class BuildProgress:
    """Says from time to time how far a build is; the share done is by bytes of input."""

    def __init__(self, units: UnitTable, writer: StoreWriter, report: Callable[[str], None]) -> None:
        self._writer = writer
        self._report = report
        self._bytes_before = units.sum_bytes()
        self._line = ProgressLine(report)
        self._started = time.monotonic()
        self._first = self._now()
        self._pace = Pace(self.total_bytes, done=self._first[0])

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole input."""
        return int(self._bytes_before[-1])

    def update(self) -> None:
        """Says it when it is time."""
        self._pace.note(self._count_bytes())
        self._line.show(self._describe)

    def finish(self) -> None:
        """Reports the end."""
        self.close()
        self._report(self._describe())

    def close(self) -> None:
        """Ends the display."""
        self._line.close()

    def _count_bytes(self) -> int:
        return int(self._bytes_before[self._writer.state.unit])

    def _now(self) -> tuple[int, int, int]:
        """Bytes, documents, tokens."""
        state = self._writer.state
        documents = sum(progress.counts["in"] for progress in state.sources)
        tokens = sum(progress.num_tokens + progress.num_validation_tokens for progress in state.sources)
        return self._count_bytes(), documents, tokens

    def _describe(self) -> str:
        elapsed_s = max(time.monotonic() - self._started, 1e-9)
        now = self._now()
        documents, tokens = (after - before for after, before in zip(now[1:], self._first[1:], strict=True))
        share = now[0] / max(self.total_bytes, 1)
        kept = sum(progress.counts[KEPT] for progress in self._writer.state.sources)
        line = (
            f"{share:6.1%}  {now[1]:,} documents in ({documents / elapsed_s:,.0f}/s), {kept:,} kept,"
            f" {now[2]:,} tokens ({tokens / elapsed_s:,.0f}/s)"
        )
        left_s = self._pace.estimate_left_s(now[0])
        if left_s:
            line += f", {timedelta(seconds=round(left_s))} left"
        return line
