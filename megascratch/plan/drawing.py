"""Draw what pipeline ranks do when: one row a rank, one box an action, as SVG, PNG or a Chrome trace.

A chart is a title over rows; several are drawn one under the other on the same scale, so that a simulated step and the
recorded one can be compared box by box. Boxes on the critical path have a dark edge.

    1F1B, pp = 2            bubble 33.3 %  step bubble 33.3 %  peak 2 activations
    rank 0  ▇0▇ ▇1▇ . . ▇▇0▇▇ . ▇▇1▇▇
    rank 1  .   ▇0▇ ▇▇0▇▇ ▇1▇ ▇▇1▇▇ . .

The forms are laid out once (`_layout`) and written twice: as text for SVG, and by Pillow for PNG.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

from megascratch.errors import MissingDependency, Problem
from megascratch.pipeline import Event, Kind, Timeline

WIDTH, LEFT, ROW, HEADER, MARGIN = 1400, 70, 24, 34, 10  # pixels

# Forward, whole backward, and its two halves; a rank's later stages have a lighter shade of the same colour.
_COLOURS = {Kind.F: (70, 120, 190), Kind.B: (80, 160, 95), Kind.I: (60, 165, 165), Kind.W: (215, 150, 50)}
_EDGE, _PLAIN = (25, 25, 25), (255, 255, 255)
_LEGIBLE = 13  # a box of fewer pixels has no room for its microbatch


@dataclass(frozen=True)
class Chart:
    """One timeline with what is to be said of it.

    Attributes:
        title: above the rows.
        timeline: simulated or recorded.
        critical: events on the critical path, or none.
        unit: of the times.
    """

    title: str
    timeline: Timeline
    critical: Sequence[Event] = ()
    unit: str = "units"

    @property
    def summary(self) -> str:
        """The numbers that a schedule is chosen by."""
        times = self.timeline
        return (
            f"{times.makespan:.4g} {self.unit}, bubble {times.bubble:.1%}, of the whole step {times.step_bubble:.1%},"
            f" at most {max(times.peak_in_flight)} activations on a rank"
        )


class _Box(NamedTuple):
    x: float
    y: float
    width: float
    height: float
    fill: tuple[int, int, int]
    edge: tuple[int, int, int]
    label: str
    hint: str


class _Text(NamedTuple):
    x: float
    y: float
    text: str


def svg(charts: Sequence[Chart]) -> str:
    """Return a picture as SVG text; every box tells its action and times when pointed at."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{_height(charts)}"'
        ' font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for shape in _layout(charts):
        if isinstance(shape, _Text):
            lines.append(f'<text x="{shape.x:.1f}" y="{shape.y:.1f}">{escape(shape.text)}</text>')
            continue
        lines.append(
            f'<rect x="{shape.x:.2f}" y="{shape.y:.1f}" width="{shape.width:.2f}" height="{shape.height}"'
            f' fill="{_css(shape.fill)}" stroke="{_css(shape.edge)}"><title>{escape(shape.hint)}</title></rect>'
        )
        if shape.width >= _LEGIBLE:
            middle = shape.x + shape.width / 2
            lines.append(
                f'<text x="{middle:.1f}" y="{shape.y + 15:.1f}" text-anchor="middle" font-size="10" fill="white"'
                f' pointer-events="none">{shape.label}</text>'
            )
    return "\n".join([*lines, "</svg>\n"])


def png(charts: Sequence[Chart], file: Path) -> None:
    """Write a picture as PNG.

    Raises: MissingDependency: if Pillow is not installed.
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError:
        raise MissingDependency(Problem("Pillow", "is needed for PNG", "pip install pillow, or draw SVG")) from None
    image = Image.new("RGB", (WIDTH, _height(charts)), "white")
    draw = ImageDraw.Draw(image)
    for shape in _layout(charts):
        if isinstance(shape, _Text):
            draw.text((shape.x, shape.y - 11), shape.text, fill=_EDGE)
            continue
        corner = (shape.x + max(shape.width, 1), shape.y + shape.height)
        draw.rectangle(((shape.x, shape.y), corner), fill=shape.fill, outline=shape.edge)
        if shape.width >= _LEGIBLE:
            draw.text((shape.x + shape.width / 2, shape.y + 11), shape.label, fill="white", anchor="mm")
    image.save(file, format="PNG")


def chrome_trace(charts: Sequence[Chart]) -> str:
    """Return a trace for chrome://tracing or Perfetto: a process a chart, a thread a rank, times in microseconds.

    Times without a unit are taken as milliseconds.
    """
    events: list[dict[str, object]] = []
    for process, chart in enumerate(charts):
        scale = 1e6 if chart.unit == "s" else 1e3
        title = f"{chart.title}: {chart.summary}"
        events.append({"ph": "M", "name": "process_name", "pid": process, "args": {"name": title}})
        critical = {event.action for event in chart.critical}
        for rank, own in enumerate(chart.timeline.computes()):
            events.append(
                {"ph": "M", "name": "thread_name", "pid": process, "tid": rank, "args": {"name": f"rank {rank}"}}
            )
            for event in own:
                action = event.action
                events.append(
                    {
                        "ph": "X",
                        "name": str(action),
                        "cat": "critical" if action in critical else action.kind.value,
                        "pid": process,
                        "tid": rank,
                        "ts": event.start * scale,
                        "dur": (event.end - event.start) * scale,
                        "args": {"stage": action.stage, "microbatch": action.microbatch},
                    }
                )
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _height(charts: Sequence[Chart]) -> int:
    return sum(HEADER + ROW * len(chart.timeline.events) + MARGIN for chart in charts)


def _layout(charts: Sequence[Chart]) -> Iterator[_Box | _Text]:
    """Yield the forms of all charts from top to bottom, on one scale of time where they have one unit."""
    top = 0.0
    for chart in charts:
        longest = max(other.timeline.makespan for other in charts if other.unit == chart.unit)
        scale = (WIDTH - LEFT - MARGIN) / longest
        yield _Text(MARGIN, top + 22, f"{chart.title}: {chart.summary}")
        yield from _rows(chart, top + HEADER, scale)
        top += HEADER + ROW * len(chart.timeline.events) + MARGIN


def _rows(chart: Chart, top: float, scale: float) -> Iterator[_Box | _Text]:
    computes = chart.timeline.computes()
    critical = {event.action for event in chart.critical}
    origin = min(own[0].start for own in computes)
    for rank, own in enumerate(computes):
        y = top + ROW * rank
        yield _Text(MARGIN, y + 16, f"rank {rank}")
        stages = sorted({event.action.stage for event in own})
        for event in own:
            action = event.action
            lighter = stages.index(action.stage) / (2 * len(stages))
            red, green, blue = (round(c + (255 - c) * lighter) for c in _COLOURS[action.kind])
            yield _Box(
                LEFT + (event.start - origin) * scale,
                y,
                (event.end - event.start) * scale,
                ROW - 3,
                (red, green, blue),
                _EDGE if action in critical else _PLAIN,
                str(action.microbatch),
                f"{action}: {event.start:.6g} to {event.end:.6g} {chart.unit}",
            )


def _css(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
