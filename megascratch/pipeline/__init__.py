"""Pipeline schedules as data: lists of actions that are generated, completed, checked and run."""

from megascratch.pipeline.action import Action, Kind, ScheduleError, rank_of
from megascratch.pipeline.check import Report, check
from megascratch.pipeline.passes import add_communication
from megascratch.pipeline.run import Boundary, RunReport, StageFn, run
from megascratch.pipeline.schedules import SCHEDULES, forward_only

__all__ = [
    "SCHEDULES",
    "Action",
    "Boundary",
    "Kind",
    "Report",
    "RunReport",
    "ScheduleError",
    "StageFn",
    "add_communication",
    "check",
    "forward_only",
    "rank_of",
    "run",
]
