"""The bare tokenizer in two processes that take turns with a build: a machine's clock moves, and both must see all of it."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
from tokenizers import Tokenizer

BATCH = 256
BUILD_TURN_S = 6.0
BARE_TURN_S = 3.0
BUILDERS = "ray::MapWorker"


def make_bare(tokenizer_json: str) -> Callable[[list[str]], int]:
    """Counts the tokens of a batch by `tokenizers`."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_str(tokenizer_json)
    return lambda batch: sum(map(len, tokenizer.encode_batch_fast(batch, add_special_tokens=False)))


def encode_in_turns(tokenizer_json: str, texts: list[str], pipe: Any) -> None:
    """A peer's process: encodes its texts, again and again, for as many seconds as it is told.

    Answers each turn with (tokens, wall seconds, CPU seconds).
    """
    count_tokens = make_bare(tokenizer_json)
    batches = itertools.cycle([texts[start : start + BATCH] for start in range(0, len(texts), BATCH)])
    count_tokens(next(batches))
    pipe.send(None)
    while seconds := pipe.recv():
        wall, cpu, tokens = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - wall < seconds:
            tokens += count_tokens(next(batches))
        pipe.send((tokens, time.perf_counter() - wall, time.process_time() - cpu))


class BareTurns:
    """While it is open, the builders of a Ray cluster stand still every so often and two bare tokenizers run instead."""

    def __init__(self, tokenizer_json: str, texts: list[str]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for half in range(2):
            here, there = context.Pipe()
            process = context.Process(target=encode_in_turns, args=(tokenizer_json, texts[half::2], there), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)
        for pipe in self._pipes:
            pipe.recv()
        self.pids = frozenset(process.pid for process in self._processes if process.pid is not None)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.paused_s = 0.0
        self.driver_cpu_s = 0.0
        """What this process went on to do for the build while the tokenizers ran: the build must answer for it."""
        self.turns: list[dict[str, float]] = []

    def __enter__(self) -> BareTurns:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        if not self.turns:  # the build was over before the first
            self._take_turn([])
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.send(0)
            process.join()

    def describe(self) -> dict[str, float]:
        """Rates over all turns."""
        tokens = sum(turn["tokens"] for turn in self.turns)
        return {
            "turns": len(self.turns),
            "tokens": tokens,
            "tokens_per_s": tokens / sum(turn["wall_s"] for turn in self.turns),
            "tokens_per_cpu_s": tokens / sum(turn["cpu_s"] for turn in self.turns),
            "slowest_turn": min(turn["tokens"] / turn["wall_s"] for turn in self.turns),
            "fastest_turn": max(turn["tokens"] / turn["wall_s"] for turn in self.turns),
        }

    def _run(self) -> None:
        while not self._stop.wait(BUILD_TURN_S):
            children = psutil.Process().children(recursive=True)
            builders = [child for child in children if " ".join(child.cmdline()).startswith(BUILDERS)]
            if not builders:
                continue
            self._take_turn(builders)

    def _take_turn(self, builders: list[psutil.Process]) -> None:
        started, cpu = time.perf_counter(), time.process_time()
        for builder in builders:
            builder.suspend()
        try:
            for pipe in self._pipes:
                pipe.send(BARE_TURN_S)
            parts = [pipe.recv() for pipe in self._pipes]
        finally:
            for builder in builders:
                builder.resume()
        self.paused_s += time.perf_counter() - started
        self.driver_cpu_s += time.process_time() - cpu
        tokens, wall_s, cpu_s = (list(values) for values in zip(*parts, strict=True))
        self.turns.append({"tokens": sum(tokens), "wall_s": max(wall_s), "cpu_s": sum(cpu_s)})
