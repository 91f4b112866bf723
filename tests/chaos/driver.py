"""The victim of a storm as a process forked from one that has imported torch and transformers: a third of a submission's cost."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import sys
from pathlib import Path

from tests.ray_script import script_environment
from tests.worker_zygote import PRELOADED

_FORKS = multiprocessing.get_context("forkserver")


class Driver:
    """One submission; looks like a `subprocess.Popen`."""

    def __init__(self, arguments: list[str], output: Path, **extra: str) -> None:
        """Starts it; `extra` are variables of its environment."""
        _FORKS.set_forkserver_preload(list(PRELOADED))
        self._process = _FORKS.Process(target=_run, args=(arguments, str(output), script_environment(**extra)))
        self._process.start()

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self) -> int:
        """The same once it has ended."""
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode


def _run(arguments: list[str], output: str, environment: dict[str, str]) -> None:
    os.setpgid(0, 0)
    with Path(output).open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    sys.argv = ["victim.py", *arguments]
    from layerplan.entry import run_guarded
    from tests.chaos.victim import main

    try:
        code = run_guarded(main)
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    sys.exit(code)
