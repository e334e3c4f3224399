"""`StepClock`: where a rank's time goes. Regions nest, and every moment counts once, for the innermost of them.

By hand: a backward pass of 5 ms that holds one all-reduce of 2 ms is

    with clock.region("backward"):            backward       ├──┤          ├─┤     3 ms
        …  with clock.region("communication") communication      ├──────┤          2 ms

On a GPU the host only queues the work, so moments are events on its stream: communication is then what computing had to
wait for, not what ran beside it.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import record_function


class StepClock:
    """Adds up the time of regions until it is read.

    Args:
        device: whose time counts.

    Attributes:
        naming: whether regions are also named in the trace of a profiler that is running.
        step: of training, for whoever asks where this rank is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.naming, self.step = device, False, 0
        self._counting = True
        self._open: list[tuple[str, str, record_function | None]] = []  # kind, label, name in a trace
        self._switched_s = time.monotonic()
        self._since: Any = None
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def region(self, kind: str, label: str = "") -> Iterator[None]:
        """Count the body as time of a kind; a trace shows the label, or else the kind."""
        self.enter(kind, label)
        try:
            yield
        finally:
            self.leave()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the regions of the body uncounted: what is recorded in a CUDA graph has no time of its own."""
        self._counting = False
        try:
            yield
        finally:
            self._counting = True

    def enter(self, kind: str, label: str = "") -> None:
        """Begin a region, inside the one that is open."""
        if not self._counting:
            return
        self._switch()
        named = record_function(label or kind) if self.naming else None
        if named is not None:
            named.__enter__()
        self._open.append((kind, label or kind, named))

    def leave(self) -> None:
        """End the innermost region."""
        if not self._counting:
            return
        self._switch()
        *_, named = self._open.pop()
        if named is not None:
            named.__exit__(None, None, None)

    def read(self) -> dict[str, float]:
        """Return the seconds of each kind since the last reading. On a GPU it waits for the work that is queued."""
        assert not self._open, f"read inside {self._open}"
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(self.device)
        seconds: dict[str, float] = defaultdict(float)
        for kind, start, end in self._spans:
            seconds[kind] += start.elapsed_time(end) / 1e3 if cuda else end - start
        self._spans.clear()
        return dict(seconds)

    def now(self) -> tuple[str, bool, float]:
        """Return what the rank is doing, whether it waits for others, and since when (monotonic), to any thread."""
        regions, since = list(self._open), self._switched_s
        if not regions:
            return "between regions", False, since
        kind, label, _ = regions[-1]
        # On a GPU the host may wait for others anywhere, for its own queue to run dry.
        return label, kind == "communication" or self.device.type == "cuda", since

    def _switch(self) -> None:
        """End the span of the innermost region: it is entered, left, or gives way to one inside it."""
        now, self._switched_s = self._now(), time.monotonic()
        if self._open:
            self._spans.append((self._open[-1][0], self._since, now))
        self._since = now

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event
