"""Recorded steps: read them back, and find what actions cost, so that the schedule can be simulated with real costs."""

import json
from math import inf
from pathlib import Path
from statistics import median

from megascratch.errors import DataError, Problem
from megascratch.pipeline import Action, Costs, Event, Kind, Schedule, ScheduleError, Timeline, check

_MAX_BYTES = 256 * 2**20


def read_times(file: Path) -> tuple[Timeline, Schedule]:
    """Read what `log.pipeline_step` recorded.

    Returns: the timeline in seconds, and the schedule that was executed.

    Raises: DataError: if the file is missing or no such recording.
    """
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise DataError(Problem(str(file), f"is larger than {_MAX_BYTES} bytes", "check the path"))
        data = json.loads(file.read_text(encoding="utf-8"))
        events = [
            [Event(Action.parse(text), float(start), float(end)) for text, start, end in own] for own in data["events"]
        ]
        n_microbatches = int(data["n_microbatches"])
        if not all(events) or not 0 < n_microbatches <= sum(map(len, events)):
            raise ValueError("a rank without an action, or more microbatches than actions")
        if not all(-inf < event.start <= event.end < inf for own in events for event in own):
            raise ValueError("an action that ends before it starts")
        routes = tuple(tuple(int(rank) for rank in route) for route in data["routes"])
        schedule = Schedule([[event.action for event in own] for own in events], routes, n_microbatches)
        check(schedule)
    except OSError as error:
        raise DataError(Problem(str(file), "cannot be read", str(error))) from None
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, ScheduleError) as error:
        problem = Problem(str(file), "is no recording of a pipeline step", "record one with log.pipeline_step")
        raise DataError(problem) from error
    return Timeline(events), schedule


def measured_costs(timeline: Timeline, n_stages: int) -> Costs:
    """Return what actions cost in a recorded step: medians over the microbatches, and each stage's share of the work.

    A whole backward is halved into I and W. Transfers are left at 0: waiting cannot be told from moving.
    """
    times: dict[tuple[int, Kind], list[float]] = {}
    for own in timeline.computes():
        for event in own:
            times.setdefault((event.action.stage, event.action.kind), []).append(event.end - event.start)
    of = {key: median(values) for key, values in times.items()}

    def mean(kind: Kind) -> float:
        return sum(of.get((stage, kind), 0.0) for stage in range(n_stages)) / n_stages

    whole = mean(Kind.B) / 2
    costs = Costs(mean(Kind.F), mean(Kind.I) + whole, mean(Kind.W) + whole)
    work = [sum(of.get((stage, kind), 0.0) for kind in (Kind.F, Kind.B, Kind.I, Kind.W)) for stage in range(n_stages)]
    total = sum(work)
    return Costs(
        costs.forward,
        costs.input_grad,
        costs.weight_grad,
        shares=tuple(part * n_stages / total for part in work) if total else (),
    )
