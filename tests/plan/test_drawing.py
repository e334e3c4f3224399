"""Drawings say what the timeline says: one box an action, the critical path marked, bubble and peak in the title."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from command_line import exit_code

from megascratch.config import ParallelConfig
from megascratch.errors import DataError
from megascratch.pipeline import (
    Costs,
    ScheduleError,
    add_communication,
    configured_schedule,
    critical_path,
    make_schedule,
    simulate,
    times_text,
)
from megascratch.plan import Chart, chrome_trace, measured_costs, png, read_times, svg

COSTS = Costs(1.0, 1.5, 0.5, 0.25)


def _chart(name: str = "zb-h1", pp: int = 3, m: int = 5, unit: str = "units") -> Chart:
    schedule = make_schedule(name, pp, 1, m, COSTS)
    timeline = simulate(schedule, COSTS)
    return Chart(f"{name} <&>", timeline, critical_path(timeline, schedule, COSTS), unit)


def test_svg_has_a_box_an_action_and_marks_the_critical_path() -> None:
    chart = _chart()
    root = ElementTree.fromstring(svg([chart, chart]))
    boxes = [box for box in root.iter("{http://www.w3.org/2000/svg}rect") if len(box)]
    assert len(boxes) == 2 * 3 * 3 * 5
    hints = [box[0].text or "" for box in boxes]
    assert hints[0] == "0F0: 0 to 1 units"
    dark = {hint.partition(":")[0] for box, hint in zip(boxes, hints) if box.get("stroke") == "#191919"}
    assert dark == {str(event.action) for event in chart.critical}
    texts = [text.text or "" for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0].startswith("zb-h1 <&>: ")
    assert f"bubble {chart.timeline.bubble:.1%}" in texts[0]
    assert "at most 3 activations" in texts[0]


def test_boxes_are_as_wide_as_actions_are_long_on_one_scale() -> None:
    longer = _chart(m=9)
    root = ElementTree.fromstring(svg([_chart(), longer]))
    boxes = [box for box in root.iter("{http://www.w3.org/2000/svg}rect") if len(box)]
    widths = {(box[0].text or "").partition(":")[0]: float(box.get("width", 0)) for box in boxes}
    assert widths["0I0"] == pytest.approx(1.5 * widths["0F0"], abs=0.02)
    ends = [float(box.get("x", 0)) + float(box.get("width", 0)) for box in boxes]
    assert max(ends) == pytest.approx(1390, abs=0.1)
    assert max(ends[: 3 * 3 * 5]) < 1000


def test_chrome_trace_has_a_process_a_chart_and_a_thread_a_rank() -> None:
    chart = _chart(unit="s")
    events = json.loads(chrome_trace([chart]))["traceEvents"]
    boxes = [event for event in events if event["ph"] == "X"]
    assert {event["tid"] for event in boxes} == {0, 1, 2}
    assert len(boxes) == 3 * 3 * 5
    first = next(event for event in boxes if event["name"] == "1I0")
    simulated = next(event for event in chart.timeline.events[1] if str(event.action) == "1I0")
    assert (first["ts"], first["dur"]) == (simulated.start * 1e6, 1.5e6)
    assert sum(event["cat"] == "critical" for event in boxes) == len(chart.critical)
    assert "bubble" in events[0]["args"]["name"]


def test_png_is_a_picture_of_the_same_size(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    png([_chart()], tmp_path / "a.png")
    picture = image.open(tmp_path / "a.png")
    assert picture.size == (1400, 34 + 3 * 24 + 10)
    assert len(picture.getcolors(100_000)) > 10


@pytest.mark.parametrize("name", ["1f1b", "zb-h1"])
def test_a_recording_is_read_back_with_its_costs(name: str, tmp_path: Path) -> None:
    schedule = add_communication(make_schedule(name, 3, 1, 5))
    timeline = simulate(schedule, Costs(1.0, 1.5, 1.5, shares=(0.5, 1.5, 1.0)))
    file = tmp_path / "times.json"
    file.write_text(times_text(timeline, schedule))
    recorded, executed = read_times(file)
    assert recorded == timeline
    assert executed.routes == schedule.routes
    costs = measured_costs(recorded, 3)
    assert (costs.forward, costs.input_grad, costs.weight_grad) == pytest.approx((1.0, 1.5, 1.5))
    assert costs.shares == pytest.approx((0.5, 1.5, 1.0))
    assert simulate(executed, costs).makespan == pytest.approx(timeline.makespan)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        '{"routes": [], "n_microbatches": 1, "events": []}',
        '{"routes": [[0]], "n_microbatches": 0, "events": [[]]}',
        '{"routes": [[0]], "n_microbatches": 1, "events": [[["0F0", 0, 1]]]}',
        '{"routes": [[0]], "n_microbatches": 1, "events": [[["0F0", 0, 1], ["0B0", 1, NaN]]]}',
        '{"routes": [[0]], "n_microbatches": 1000000000, "events": [[["0F0", 0, 1], ["0B0", 1, 2]]]}',
    ],
)
def test_what_is_no_recording_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "times.json"
    file.write_text(text)
    with pytest.raises(DataError, match=r"times.json +is no recording of a pipeline step"):
        read_times(file)


def test_a_missing_recording_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"times.json +cannot be read"):
        read_times(tmp_path / "times.json")


def test_the_verb_says_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / f"plan.{suffix}" for suffix in ("svg", "json")]
    outs = [word for file in files for word in ("--out", file)]
    assert exit_code("plan", "--schedule", "1f1b", "--pp", 4, "--microbatches", 8, *outs) == 0
    said = capsys.readouterr().out
    assert "time           33 units" in said
    assert "bubble         27.27% of the longest rank's window; 27.27% of the whole step" in said
    assert "at most 4 3 2 1 (rank 0 …)" in said
    assert "critical path  22 actions: 0F0 1F0 2F0 3F0" in said
    assert all(file.stat().st_size > 1000 for file in files)
    assert exit_code("plan", "--schedule", "1f1b", "--out", files[0]) == 2
    assert "exists, and is not overwritten" in capsys.readouterr().err


def test_the_verb_writes_what_the_engine_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A schedule for one's own costs: plan it, write it, run it."""
    file = tmp_path / "mine.txt"
    costs = ["--forward", 1, "--input-grad", 1.2, "--weight-grad", 0.6]
    assert exit_code("plan", "--schedule", "zb-v", "--pp", 2, "--microbatches", 6, *costs, "--out", file) == 0
    parallel = ParallelConfig(pp=2, vp=2, schedule_file=str(file))
    planned = add_communication(make_schedule("zb-v", 2, 2, 6, Costs(1, 1.2, 0.6)))
    assert configured_schedule(parallel, 6).actions == planned.actions
    bounded = parallel.model_copy(update={"max_in_flight": 3})
    with pytest.raises(ScheduleError, match=r"rank 0 +must hold at most 3 activations at once, holds 4"):
        configured_schedule(bounded, 6)


def test_the_verb_reads_a_users_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("0F0 0F1 0B0 0B1\n1F0 1B0 1F1 1B1  # 1F1B\n")
    assert exit_code("plan", "--schedule", file) == 0
    assert "(2 ranks, 2 stages, 2 microbatches)" in capsys.readouterr().out
    file.write_text("0F0 0F1 0B0 0B1\n1F0 1B0 1B1 1F1\n")
    assert exit_code("plan", "--schedule", file) == 2
    assert "rank 1: 1B1  waits for ever for 1F1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "--schedule and --times  say what to draw: give one of them"),
        (["--schedule", "2f2b"], "--schedule 2f2b  is neither a schedule nor a file of one  use gpipe, 1f1b"),
        (["--schedule", "zb-v", "--vp", "3"], "vp = 3  the zb-v schedule runs 2 stages a rank"),
        (["--schedule", "1f1b", "--out", "a.pdf"], "must end in .svg, .png, .json or .txt"),
        (["--schedule", "1f1b", "--out", "no/where/a.svg"], "lies in no folder"),
    ],
)
def test_the_verb_refuses(arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("plan", *arguments) == 2
    assert reason in capsys.readouterr().err
