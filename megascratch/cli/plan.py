"""`megascratch plan`: what a recipe needs and what a pipeline schedule costs, before anything is launched."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megascratch.cli.recipe import RecipeArguments, split_arguments
from megascratch.errors import ConfigError, Problem

if TYPE_CHECKING:
    from megascratch.config import Config
    from megascratch.pipeline import Costs, Schedule
    from megascratch.plan import Chart

_MEMORY = ("weights", "gradients", "optimizer", "activations", "passing")


def plan(
    arguments: RecipeArguments = None,
    schedule: Annotated[str | None, typer.Option(help="1f1b, zb-v, …, or a file of your own: a line a rank.")] = None,
    pp: Annotated[int, typer.Option(min=1, help="Pipeline ranks.")] = 4,
    vp: Annotated[int | None, typer.Option(min=1, help="Stages a rank; what the schedule needs when left out.")] = None,
    microbatches: Annotated[int, typer.Option(min=1, help="In a step, on each data-parallel rank.")] = 8,
    forward: Annotated[float, typer.Option(min=0.0, help="Time of a stage's forward.")] = 1.0,
    input_grad: Annotated[float, typer.Option(min=0.0, help="Time of its input gradient.")] = 1.0,
    weight_grad: Annotated[float, typer.Option(min=0.0, help="Time of its weight gradients.")] = 1.0,
    transfer: Annotated[float, typer.Option(min=0.0, help="Time of a transfer between ranks.")] = 0.0,
    times: Annotated[Path | None, typer.Option(help="A recorded step (log.pipeline_step), drawn beside.")] = None,
    out: Annotated[
        list[Path] | None, typer.Option(help="A picture (.svg, .png), Chrome trace (.json), or schedule file (.txt).")
    ] = None,
) -> None:
    """Count what a recipe needs: parameters, operations, memory. Simulate and draw a pipeline schedule."""
    from megascratch.pipeline import Costs
    from megascratch.plan import Chart, measured_costs, read_times

    if arguments:
        _print_recipe(arguments)
        if schedule is None and times is None:
            return
    files = out or []
    for file in files:
        _require_writable(file)
    if (schedule is None) == (times is None):
        rule = "say what to draw: give one of them, or a recipe to count"
        raise ConfigError(Problem("--schedule and --times", rule, "for example --schedule zb-v"), "the command line")
    if times is not None:
        recorded, executed = read_times(times)
        costs = measured_costs(recorded, executed.n_stages)
        planned = executed
        charts = [_chart("simulated with the recorded costs", planned, costs, "s")]
        charts.append(Chart(f"recorded in {times.name}", recorded, unit="s"))
    else:
        assert schedule is not None
        costs = Costs(forward, input_grad, weight_grad, transfer)
        planned = _find_schedule(schedule, pp, vp, microbatches, costs)
        charts = [_chart(schedule, planned, costs, "units")]
    for chart in charts:
        _print(chart)
    for file in files:
        _write(charts, planned, file)
        print(f"wrote {file}")


def _print_recipe(arguments: list[str]) -> None:
    """Print what a recipe amounts to."""
    from megascratch.config import load_config
    from megascratch.engine.memory import GIB
    from megascratch.plan.model import plan_model

    recipe, overrides = split_arguments(arguments)
    config = load_config(recipe, overrides)
    if config.model.vocab_size is None:
        problem = Problem("model.vocab_size", "must be given to count the model", "for example model.vocab_size=128256")
        raise ConfigError(problem, str(recipe or "the command line"))
    planned = plan_model(config)
    print(f"{planned.parameters:,} parameters, {planned.active / 1e9:.4g} billion of them for each token")
    causal, palm = planned.flops.causal / 1e9, planned.flops.palm / 1e9
    print(f"{causal:.4g} GFLOP a token in training ({palm:.4g} in PaLM's convention)")
    print(_run_length(config))
    print(f"memory of pipeline ranks, GiB    {' '.join(f'{name:>11}' for name in (*_MEMORY, 'total', 'host'))}")
    for rank, memory in enumerate(planned.memory):
        values = [*(getattr(memory, name) for name in _MEMORY), memory.total, memory.host]
        print(f"  rank {rank:<25} {' '.join(f'{value / GIB:>11.2f}' for value in values)}")


def _run_length(config: "Config") -> str:
    """Say how much a run reads, and how its batch grows."""
    train = config.train
    n_samples = train.samples_of(train.steps)
    said = f"{train.steps:,} steps read {n_samples:,} samples, {n_samples * config.data.seq_length:,} tokens"
    if train.rampup_batch_size is None:
        return f"{said}: batches of {train.global_batch:,}"
    return f"{said}: batches of {train.rampup_batch_size[0]:,} that grow to {train.global_batch:,}"


def _find_schedule(name: str, pp: int, vp: int | None, microbatches: int, costs: "Costs") -> "Schedule":
    """Return a family's schedule, or that of a file, checked."""
    from megascratch.pipeline import SCHEDULES, add_communication, check, make_schedule, parse_schedule

    if name in SCHEDULES:
        chunks = SCHEDULES[name].n_chunks or 2
        schedule = make_schedule(name, pp, vp if vp is not None else chunks, microbatches, costs)
    else:
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            rule = "is neither a schedule nor a file of one"
            remedy = f"use {', '.join(SCHEDULES)}, or the path of a text file"
            raise ConfigError(Problem(f"--schedule {name}", rule, remedy), "the command line") from None
        schedule = parse_schedule(text, name)
    schedule = add_communication(schedule)
    check(schedule)
    return schedule


def _chart(title: str, schedule: "Schedule", costs: "Costs", unit: str) -> "Chart":
    from megascratch.pipeline import critical_path, simulate
    from megascratch.plan import Chart

    timeline = simulate(schedule, costs)
    stages = f"{len(schedule.actions)} ranks, {schedule.n_stages} stages, {schedule.n_microbatches} microbatches"
    return Chart(f"{title} ({stages})", timeline, critical_path(timeline, schedule, costs), unit)


def _print(chart: "Chart") -> None:
    times = chart.timeline
    rows = {
        "time": f"{times.makespan:.6g} {chart.unit}",
        "bubble": f"{times.bubble:.2%} of the longest rank's window; {times.step_bubble:.2%} of the whole step",
        "activations": f"at most {' '.join(map(str, times.peak_in_flight))} (rank 0 …), in stages × microbatches",
    }
    if chart.critical:
        words = [str(event.action) for event in chart.critical]
        shown = words if len(words) <= 12 else [*words[:6], "…", *words[-6:]]
        rows["critical path"] = f"{len(words)} actions: {' '.join(shown)}"
    print(chart.title)
    for name, value in rows.items():
        print(f"  {name:<14} {value}")


def _require_writable(file: Path) -> None:
    """Raise a ConfigError if a file's format is unknown, or it cannot be written, or exists."""
    problem = None
    if file.suffix not in (".svg", ".png", ".json", ".txt"):
        problem = Problem(f"--out {file}", "must end in .svg, .png, .json or .txt", "choose one")
    elif file.exists():
        problem = Problem(f"--out {file}", "exists, and is not overwritten", "choose another name, or remove it")
    elif not file.parent.is_dir():
        problem = Problem(f"--out {file}", f"lies in no folder: {file.parent} does not exist", "make the folder first")
    if problem is not None:
        raise ConfigError(problem, "the command line")


def _write(charts: "list[Chart]", schedule: "Schedule", file: Path) -> None:
    from megascratch.plan import chrome_trace, png, svg

    match file.suffix:
        case ".png":
            png(charts, file)
        case ".svg":
            file.write_text(svg(charts), encoding="utf-8")
        case ".json":
            file.write_text(chrome_trace(charts), encoding="utf-8")
        case _:
            file.write_text(f"# for parallel.schedule_file: {charts[0].title}\n{schedule}", encoding="utf-8")
