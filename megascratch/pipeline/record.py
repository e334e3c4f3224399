"""`Recorder`: when a running rank does what, for the drawing that stands beside the simulated one.

Times are wall-clock seconds, the one clock that ranks on several machines share (as well as NTP keeps it). On a GPU the
device is waited for at both ends of every action, so a recorded step is slower than others; its proportions hold.
"""

import json
import time

import torch

from megascratch.dist import comm
from megascratch.dist.mesh import Axis
from megascratch.pipeline.action import Action
from megascratch.pipeline.schedule import Schedule
from megascratch.pipeline.simulate import Event, Timeline


class Recorder:
    """Give it to `run` as `on_event`.

    Args:
        device: where the stages compute.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.events: list[Event] = []
        self._start = 0.0

    def __call__(self, action: Action, starts: bool) -> None:
        """Note the start or the end of an action."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if starts:
            self._start = time.time()
        else:
            self.events.append(Event(action, self._start, time.time()))

    def gather(self, pp: Axis) -> Timeline:
        """Put the events of all pipeline ranks together, with time 0 at the first; every rank calls this."""
        own = json.dumps([(str(event.action), event.start, event.end) for event in self.events]).encode()
        ranks = [json.loads(data) for data in comm.gather_bytes(own, pp, self.device)]
        origin = min(start for events in ranks for _, start, _ in events)
        return Timeline(
            [[Event(Action.parse(text), start - origin, end - origin) for text, start, end in own] for own in ranks]
        )


def times_text(timeline: Timeline, schedule: Schedule) -> str:
    """Return recorded times as JSON: routes, microbatches, and (action, start, end) in seconds, one list a rank."""
    events = [[(str(event.action), event.start, event.end) for event in own] for own in timeline.events]
    return json.dumps({"routes": schedule.routes, "n_microbatches": schedule.n_microbatches, "events": events})
