"""The console: what one rank says to the person who watches.

Rank 0 speaks; every other rank gets a quiet console with the same methods, so that calling code never asks for its
rank. What a rank alone knows (its copy failed) it says itself (`tell`). Output goes to stderr: stdout belongs to
results (generated text, tables, `--json`).
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


def make_console(rank: int = 0) -> Console:
    """Return the console of a rank: stderr on rank 0, silent elsewhere."""
    return Console(stderr=True, quiet=rank != 0, highlight=False, soft_wrap=True)


def tell(rank: int, message: str) -> None:
    """Say on stderr what one rank alone knows, whichever it is, with its number and its host."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"rank {rank} on {socket.gethostname()}: {message}", markup=False)


class _RateColumn(ProgressColumn):
    """Amount done, total and rate, in the task's own unit: `12.4/80.0 MB · 21.3 MB/s`."""

    def render(self, task: Task) -> Text:
        unit = task.fields["unit"]
        done, total, speed = task.completed, task.total, task.finished_speed or task.speed
        rate = f" · {_amount(speed, unit)}/s" if speed else ""
        of = f"/{_amount(total, unit)}" if total is not None else ""
        return Text(f"{_amount(done, unit)}{of}{rate}")


def _amount(value: float, unit: str) -> str:
    return decimal(int(value)) if unit == "B" else f"{value:,.0f} {unit}"


class Advance(Protocol):
    """Adds to the work done."""

    def __call__(self, amount: float, note: str = "", /) -> None:
        """Add `amount`, and show `note` behind the bar."""
        ...


@contextmanager
def progress(console: Console, description: str, total: float | None, unit: str) -> Iterator[Advance]:
    """Show a bar with amount, rate and ETA while the body runs.

    Args:
        console: where to draw; a quiet console draws nothing.
        description: what is being done, a verb phrase.
        total: amount of work in `unit`s, or None when it is not known.
        unit: name of the unit; "B" shows bytes with SI prefixes.

    Yields: `advance(amount)`, which adds to the work done; `advance(amount, note)` also shows other rates.
    """
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        _RateColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=console.quiet, transient=not console.is_terminal) as bar:
        task = bar.add_task(description, total=total, unit=unit, note="")

        def advance(amount: float, note: str = "", /) -> None:
            bar.update(task, advance=amount, note=note)

        yield advance
