"""The status of a run as a table: redrawn in place on a terminal for as long as somebody runs it, printed once elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from layerplan.log import WIDTH
from layerplan.pipeline.status import RunStatus, read_status
from layerplan.storage.working import is_remote

FOLDER_S = 2.0
ADDRESS_S = 10.0
"""Between two looks at a folder, and at an address, whose files are fetched."""


def show_status(
    run: str,
    *,
    once: bool = False,
    console: Console | None = None,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Shows how a run is doing, until nobody runs it or the user has seen enough.

    Args:
        run: Folder or address of a run.
        once: Print one table and return, on a terminal too.
        console: Where to; standard output when left out, 100 columns wide where that is no terminal.
        pause: Waits so many seconds between two looks.

    Raises:
        ConfigError: When it is no run.
    """
    console = console or Console()
    status = read_status(run, datetime.now(UTC))
    if once or not console.is_terminal:
        wide = console if console.is_terminal else Console(width=WIDTH, file=console.file)
        wide.print(render_status(status))
        return
    every_s = ADDRESS_S if is_remote(run) else FOLDER_S
    with Live(render_status(status), console=console, auto_refresh=False) as live:
        while status.is_running:
            pause(every_s)
            status = read_status(run, datetime.now(UTC))
            live.update(render_status(status), refresh=True)


def render_status(status: RunStatus) -> Table:
    """The table of a run."""
    table = Table(title=Text(_make_printable(status.name)), show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for heading, text in status.rows:
        table.add_row(heading, Text(_make_printable(text)))
    return table


def _make_printable(text: str) -> str:
    """Without what a terminal obeys: messages quote what others wrote."""
    return "".join(each if each.isprintable() else "?" for each in text)
