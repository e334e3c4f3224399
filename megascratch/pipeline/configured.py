"""From the `[parallel]` section to a checked schedule: a family by its name, or a file that the user wrote."""

from pathlib import Path

from megascratch.config import ParallelConfig
from megascratch.errors import Problem
from megascratch.pipeline.action import ScheduleError
from megascratch.pipeline.check import check
from megascratch.pipeline.passes import add_communication
from megascratch.pipeline.schedule import Route, Schedule, parse_schedule
from megascratch.pipeline.schedules import SCHEDULES, forward_only, make_schedule


def configured_routes(parallel: ParallelConfig) -> tuple[Route, ...]:
    """Return where the stages lie; the number of microbatches does not matter to it.

    Raises: ScheduleError: if the schedule's file cannot be used.
    """
    if parallel.schedule_file is not None:
        return read_schedule(parallel).routes
    return SCHEDULES[parallel.schedule or "1f1b"].routes(parallel.pp, parallel.vp)


def configured_schedule(parallel: ParallelConfig, n_microbatches: int, *, backward: bool = True) -> Schedule:
    """Return the schedule of a step, with its communication, checked.

    Args:
        parallel: resolved.
        n_microbatches: of each data-parallel rank.
        backward: False for an evaluation, which runs forwards alone.

    Raises: ScheduleError: if it cannot be had, a file holds a wrong one, or it needs more than `max_in_flight`.
    """
    if not backward:
        schedule = forward_only(configured_routes(parallel), n_microbatches)
    elif parallel.schedule_file is not None:
        schedule = read_schedule(parallel)
        if schedule.n_microbatches != n_microbatches:
            rule = f"must be {n_microbatches}: global_batch / (micro_batch × dp)"
            problem = Problem(f"{schedule.n_microbatches} microbatches", rule, "write the file for this batch")
            raise ScheduleError(problem, parallel.schedule_file)
    else:
        schedule = make_schedule(parallel.schedule or "1f1b", parallel.pp, parallel.vp, n_microbatches)
    complete = add_communication(schedule)
    check(complete, parallel.max_in_flight if backward else None, backward=backward)
    return complete


def read_schedule(parallel: ParallelConfig) -> Schedule:
    """Read the user's schedule file, as text.

    Raises: ScheduleError: if it cannot be read, or is of another number of ranks or stages.
    """
    file = parallel.schedule_file
    assert file is not None
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ScheduleError(Problem(file, "cannot be read as text", str(error))) from None
    schedule = parse_schedule(text, file)
    problems = []
    if len(schedule.actions) != parallel.pp:
        rule = f"must be parallel.pp = {parallel.pp}: one line a rank"
        problems.append(Problem(f"{len(schedule.actions)} lines", rule, "add or drop lines, or change pp"))
    if schedule.n_stages != parallel.pp * parallel.vp:
        rule = f"must be parallel.pp {parallel.pp} × vp {parallel.vp} = {parallel.pp * parallel.vp}"
        problems.append(Problem(f"{schedule.n_stages} stages", rule, "number stages from 0, or change vp"))
    if problems:
        raise ScheduleError(problems, file)
    return schedule
