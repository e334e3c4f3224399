"""The training loop end to end: run directory, validation, stopping, resuming, misfits."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import VOCAB_SIZE, pretrain_on_ranks, records, run_config, write_corpus

from megascratch.config import load_config
from megascratch.dist.testing import run_ranks
from megascratch.engine import pretrain
from megascratch.engine.guard import DivergedError
from megascratch.engine.meter import PHASES
from megascratch.engine.metrics import RunDirectory
from megascratch.errors import CheckpointError, ConfigError, DataError
from megascratch.pipeline import Kind, configured_schedule, simulate
from megascratch.plan import measured_costs, read_times


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path)


def test_a_run_leaves_what_the_contract_says(corpus: Path, tmp_path: Path) -> None:
    config = run_config(
        corpus, tmp_path, log={"tensorboard": True}, checkpoint={"every": 2, "keep": 2}, eval={"every": 3}
    )
    assert pretrain(config, None) == 0
    run = tmp_path / "run"
    assert load_config(run / "config.toml") == config
    assert list((run / "tensorboard").iterdir())
    assert (run / "checkpoints/latest").read_text().strip() == "step_00000006"
    assert sorted(p.name for p in (run / "checkpoints").glob("step_*")) == ["step_00000004", "step_00000006"]
    logged = records(config)
    assert [record["step"] for record in logged] == [1, 2, 3, 4, 5, 6]
    assert logged[-1]["tokens"] == 6 * 4 * 16
    assert {"loss", "grad_norm", "lr", "tokens_per_s", "mfu", "step_s"} <= logged[0].keys()
    assert [i for i, record in enumerate(logged, 1) if "valid_loss" in record] == [3, 6]
    assert logged[-1]["loss"] < logged[0]["loss"] < math.log(VOCAB_SIZE) + 0.5


def test_a_planned_stop_and_the_same_command_again_make_one_run(corpus: Path, tmp_path: Path) -> None:
    straight = run_config(corpus, tmp_path / "straight")
    assert pretrain(straight, None) == 0
    parts = run_config(corpus, tmp_path / "parts", train={"stop_step": 3})
    assert pretrain(parts, None) == 0
    assert pretrain(run_config(corpus, tmp_path / "parts"), None) == 0
    for got, want in zip(records(parts), records(straight), strict=True):
        assert (got["step"], got["loss"], got["grad_norm"]) == (want["step"], want["loss"], want["grad_norm"])
    assert pretrain(run_config(corpus, tmp_path / "parts"), None) == 0, "a finished run has nothing left to do"
    assert len(records(parts)) == 6


def test_the_stop_file_saves_and_returns_75(corpus: Path, tmp_path: Path) -> None:
    config = run_config(corpus, tmp_path, train={"steps": 100_000}, data={"split": "100,0,0"})
    script = (
        "import sys; from megascratch.config import load_config; from megascratch.engine import pretrain;"
        "sys.exit(pretrain(load_config(None, sys.argv[1:]), None))"
    )
    overrides = [
        f"{section}.{key}={json.dumps(value)}"
        for section, keys in config.model_dump(exclude_none=True).items()
        for key, value in keys.items()
    ]
    for ask in ("file", "signal"):
        process = subprocess.Popen([sys.executable, "-c", script, *overrides], stderr=subprocess.PIPE, text=True)
        metrics = tmp_path / "run/metrics.jsonl"
        seen = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        deadline = time.monotonic() + 60
        while not metrics.exists() or len(metrics.read_text().splitlines()) < seen + 3:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
            time.sleep(0.05)
        if ask == "file":
            (tmp_path / "run/stop").touch()
        else:
            os.kill(process.pid, signal.SIGUSR1)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 75
        assert "the same command resumes" in said
    steps = [record["step"] for record in records(config)]
    assert steps == list(range(1, len(steps) + 1)), "the second process went on where the first one stopped"


def test_validation_loss_is_the_same_on_every_layout(corpus: Path, tmp_path: Path) -> None:
    serial = run_config(corpus, tmp_path / "serial", train={"dtype": "fp64"})
    assert pretrain(serial, None) == 0
    parallel = {"tp": 2, "pp": 2, "dp": 1, "vp": 1}
    spread = run_config(corpus, tmp_path / "spread", train={"dtype": "fp64"}, parallel=parallel)
    run_ranks(4, pretrain_on_ranks, spread)
    assert records(spread)[-1]["valid_loss"] == pytest.approx(records(serial)[-1]["valid_loss"], rel=1e-9)


def test_a_recorded_step_can_be_drawn_beside_the_simulated_one(corpus: Path, tmp_path: Path) -> None:
    parallel = {"pp": 2, "dp": 1, "schedule": "zb-h1"}
    config = run_config(corpus, tmp_path, train={"steps": 2}, parallel=parallel, log={"pipeline_step": 2})
    run_ranks(2, pretrain_on_ranks, config)
    timeline, schedule = read_times(tmp_path / "run/pipeline_step_2.json")
    assert [list(own) for own in schedule.actions] == configured_schedule(config.parallel, 4).actions
    assert [len(own) for own in timeline.computes()] == [12, 12]
    ends = {event.action: event.end for own in timeline.computes() for event in own}
    for own in timeline.computes():
        for event in own:
            producer = event.action._replace(stage=0) if event.action.kind is Kind.F else event.action._replace(stage=1)
            assert event.start >= ends[producer] or event.action == producer or event.action.kind is Kind.W
    assert simulate(schedule, measured_costs(timeline, 2)).makespan <= 1.2 * timeline.makespan


def test_every_step_says_what_it_cost(corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = run_config(corpus, tmp_path, log={"tensorboard": True, "peak_tflops": 0.1})
    assert pretrain(config, None) == 0
    logged = records(config)
    for record in logged:
        parts = [record[f"{phase}_s"] for phase in PHASES]
        assert min(parts[1:4]) > 0
        assert sum(parts) <= record["step_s"]
        assert 0 < record["mfu"] < record["mfu_palm"]
        assert record["peak_memory_bytes"] > 100e6
    assert sum(sum(r[f"{phase}_s"] for phase in PHASES) for r in logged) > 0.5 * sum(r["step_s"] for r in logged)
    said = capfd.readouterr().err
    assert re.search(r"MFU \d+\.\d% causal, \d+\.\d% PaLM · ms data \d+, forward \d+, backward \d+, optimizer", said)
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    for name in ("mfu_palm", "backward_s", "peak_memory_bytes"):
        assert [event.value for event in events.Scalars(name)] == pytest.approx([r[name] for r in logged], rel=1e-6)


def test_a_traced_step_names_its_regions(corpus: Path, tmp_path: Path) -> None:
    parallel = {"pp": 2, "tp": 2, "dp": 1}
    config = run_config(corpus, tmp_path, train={"steps": 3}, parallel=parallel, log={"profile": [2]})
    run_ranks(4, pretrain_on_ranks, config)
    files = sorted(path.name for path in (tmp_path / "run/profile").iterdir())
    assert files == ["step_00000002_rank_00000.json", "step_00000002_rank_00002.json"], "one of each pipeline stage"
    names = [
        {event["name"] for event in json.loads((tmp_path / "run/profile" / file).read_text())["traceEvents"]}
        for file in files
    ]
    assert {"forward 0F1", "backward 0B0", "layers.0.attn.qkv", "reduce_scatter tp", "send pp", "optimizer"} <= names[0]
    assert {"forward 1F1", "backward 1B0", "layers.1.mlp", "all_gather tp", "receive pp", "data"} <= names[1]
    assert "layers.1.mlp" not in names[0]


def test_too_little_data_is_told_before_training(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        pretrain(run_config(corpus, tmp_path, data={"seq_length": 9000}, model={"max_seq_length": 9000}), None)
    assert not (tmp_path / "run").exists()


def test_an_id_outside_the_vocabulary_is_told_before_training(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="vocab"):
        pretrain(run_config(corpus, tmp_path, model={"vocab_size": VOCAB_SIZE - 1}), None)
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_is_not_there_is_told(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        pretrain(run_config(corpus, tmp_path, checkpoint={"load": str(tmp_path / "nowhere")}), None)


def test_a_second_job_in_the_same_directory_is_refused(corpus: Path, tmp_path: Path) -> None:
    config = run_config(corpus, tmp_path)
    holder = RunDirectory(config, writes=True)
    with pytest.raises(ConfigError, match=rf"run +is in use by process {os.getpid()} on .* +stop that job"):
        pretrain(config, None)
    holder.close()
    assert pretrain(config, None) == 0


def test_divergence_ends_the_run(corpus: Path, tmp_path: Path) -> None:
    config = run_config(
        corpus, tmp_path, optim={"lr": 1e30, "clip": 0.0}, train={"steps": 50}, faults={"max_skipped": 3}
    )
    with pytest.raises(DivergedError, match=r"in 3 steps in a row, from step \d+ on.*lower optim\.lr"):
        pretrain(config, None)
