"""Pipeline schedules as data: lists of actions that are generated, completed, checked, simulated and run."""

from megascratch.pipeline.action import Action, Kind, ScheduleError
from megascratch.pipeline.check import Report, check, peak_in_flight
from megascratch.pipeline.configured import configured_routes, configured_schedule
from megascratch.pipeline.costs import UNIT, Costs
from megascratch.pipeline.passes import add_communication
from megascratch.pipeline.record import Recorder, times_text
from megascratch.pipeline.run import Boundary, RunReport, StageFn, run
from megascratch.pipeline.schedule import Route, Schedule, looped, mirrored, parse_schedule, v_shaped
from megascratch.pipeline.schedules import SCHEDULES, forward_only, make_schedule
from megascratch.pipeline.simulate import Event, Timeline, critical_path, simulate
from megascratch.pipeline.split import split_backward

__all__ = [
    "SCHEDULES",
    "UNIT",
    "Action",
    "Boundary",
    "Costs",
    "Event",
    "Kind",
    "Recorder",
    "Report",
    "Route",
    "RunReport",
    "Schedule",
    "ScheduleError",
    "StageFn",
    "Timeline",
    "add_communication",
    "check",
    "configured_routes",
    "configured_schedule",
    "critical_path",
    "forward_only",
    "looped",
    "make_schedule",
    "mirrored",
    "parse_schedule",
    "peak_in_flight",
    "run",
    "simulate",
    "split_backward",
    "times_text",
    "v_shaped",
]
