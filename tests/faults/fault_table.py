"""Every fault that the suite provokes, and how it ends: the table that `docs/faults.md` is made of.

    python tests/faults/fault_table.py      writes docs/faults.md

A fault that a function provokes is declared with it, by `fault` in one of the modules `provoked_*.py`; one that needs
processes of its own stands in `DECLARED`, and its test looks it up. In what is said, `…` stands for anything.
"""

import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXACT = "exact continuation"
PAGE = Path(__file__).parents[2] / "docs/faults.md"
MODULES = ("provoked_in_checkpoints", "provoked_in_storage", "provoked_in_input", "provoked_in_training")

Provoke = Callable[[Any], str]


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        group: heading in the docs.
        name: what happens, in a few words.
        ends: the line that is said, or `EXACT`.
        provoke: provokes it on a `Ground`, and returns what was said; None where a test of its own does.
    """

    group: str
    name: str
    ends: str
    provoke: Provoke | None = None

    def matches(self, said: str) -> None:
        """Assert that what was said is what the table says."""
        flat = " ".join(said.split())
        pattern = ".*".join(re.escape(" ".join(part.split())) for part in self.ends.split("…"))
        assert re.search(pattern, flat), f"{self.name}: {flat!r} is not {self.ends!r}"


_GONE = "rank 1 on … does not answer: it was killed or stopped, or its node is gone; last seen in step …"
_HANGS = "rank 1 on … hangs for … s in step 3, … at …"
DECLARED = [
    Fault("Lost ranks", f"{what} in {place}", _HANGS if what == "hang" else _GONE)
    for what in ("kill", "stop", "hang")
    for place in ("forward", "backward", "optimizer", "save")
]
DECLARED += [
    Fault("Lost ranks", "a bug on one rank", "rank 1 failed"),
    Fault("Lost ranks", "a kill in save, and the same command again", EXACT),
    Fault("Lost ranks", "a kill under --max-restarts", EXACT),
    Fault("Lost nodes", "a node lost with its memory, checkpoint.local_replicate", EXACT),
    Fault("Lost nodes", "the link between two nodes goes down, as node a sees it", f"{_GONE}"),
    Fault(
        "Lost nodes",
        "the link between two nodes goes down, as node b sees it",
        "the store of the ranks' meeting does not answer: rank 0's node is gone, or the link to it; rank 1 on …",
    ),
    Fault("Lost nodes", "copies to be replicated on one node", "needs another node: all 4 ranks see the same …"),
]
_provoked: list[Fault] = []


def fault(group: str, name: str, ends: str) -> Callable[[Provoke], Provoke]:
    """Declare the fault that a function provokes."""

    def declare(provoke: Provoke) -> Provoke:
        _provoked.append(Fault(group, name, ends, provoke))
        return provoke

    return declare


def all_faults() -> list[Fault]:
    """Return every fault of the table."""
    for module in MODULES:
        importlib.import_module(module)
    return [*DECLARED, *_provoked]


def fault_of(name: str) -> Fault:
    """Return a declared fault by its name."""
    return next(fault for fault in DECLARED if fault.name == name)


def page() -> str:
    """Return the text of the docs."""
    faults = all_faults()
    lines = [
        "# Faults, and how each ends",
        "",
        "Made by `python tests/faults/fault_table.py` from what the tests provoke: every line here is one that a test",
        f"sees. {len(faults)} faults; *{EXACT}* means that the run, started again, gives the losses of one that was",
        "not disturbed, bit for bit on the same layout. `…` stands for names, numbers and paths.",
    ]
    for group in dict.fromkeys(fault.group for fault in faults):
        lines += ["", f"## {group}", "", "| what happens | how it ends |", "|---|---|"]
        for fault in faults:
            if fault.group == group:
                ends = f"*{EXACT}*" if fault.ends == EXACT else f"`{fault.ends}`".replace("|", "\\|")
                lines.append(f"| {fault.name} | {ends} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    importlib.import_module("fault_table").PAGE.write_text(importlib.import_module("fault_table").page())
