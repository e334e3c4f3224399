"""When a run saves, what it does about a failure, and where it goes on from."""

import importlib
import re
import shutil
import threading
import time
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from tiny_run import files_of, losses, pretrain_on_ranks, records, run_config, write_corpus

from megascratch.checkpoint import complete_steps, place
from megascratch.config import Config
from megascratch.dist.testing import RankPool
from megascratch.engine import pretrain
from megascratch.errors import CheckpointError, ConfigError, Problem

save_module = importlib.import_module("megascratch.checkpoint.save")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def straight(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of six steps without a stop."""
    config = run_config(corpus, tmp_path_factory.mktemp("straight"))
    assert pretrain(config, None) == 0
    return losses(config)


def names(config: Config) -> list[str]:
    assert config.checkpoint.dir is not None
    return sorted(path.name for path in complete_steps(place(config.checkpoint.dir)))


def test_asynchronous_checkpoints_hold_the_step_that_they_name(corpus: Path, tmp_path: Path) -> None:
    runs = [
        run_config(corpus, tmp_path / f"{how}", checkpoint={"every": 1, "asynchronous": how}, eval={"batches": 1})
        for how in (False, True)
    ]
    for config in runs:
        assert pretrain(config, None) == 0
    saved = sorted(set(names(runs[1])) & set(names(runs[0])))
    assert saved[-1] == "step_00000006"
    assert len(saved) >= 3, "a step that comes while one is written waits for it"
    for name in saved:
        assert files_of(runs[0], int(name[5:])) == files_of(runs[1], int(name[5:])), name


@pytest.mark.parametrize("asynchronous", [False, True])
def test_recycled_files_hold_what_new_ones_would(corpus: Path, tmp_path: Path, asynchronous: bool) -> None:
    """One checkpoint more than `keep` stays, for its space; pieces are those of a run that takes new files."""
    checkpoint = {"every": 1, "keep": 2, "asynchronous": asynchronous}
    runs = [
        run_config(corpus, tmp_path / f"{how}", checkpoint={**checkpoint, "recycle": how}, eval={"batches": 1})
        for how in (False, True)
    ]
    for config in runs:
        assert pretrain(config, None) == 0
    assert files_of(runs[0], 6) == files_of(runs[1], 6)
    assert losses(runs[0]) == losses(runs[1])
    assert len(names(runs[1])) == 2
    assert [Path(str(config.checkpoint.dir), "spare.tmp").exists() for config in runs] == [False, True]


def test_training_goes_on_while_a_checkpoint_is_written(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The writer waits until step 5 is logged; then the checkpoint of step 2 appears."""
    config = run_config(corpus, tmp_path, checkpoint={"every": 2, "asynchronous": True, "keep": 9})
    original = save_module.write_pieces
    config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"every": 4})})

    def slow(path: Path, *rest: Any, **options: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            while len(records(config)) < 5:
                time.sleep(0.002)
        return original(path, *rest, **options)

    monkeypatch.setattr(save_module, "write_pieces", slow)
    assert pretrain(config, None) == 0
    assert names(config) == ["step_00000004", "step_00000006"]
    said = capfd.readouterr().err
    assert said.index("step      5") < said.index("saved")


def fail_in_background(monkeypatch: pytest.MonkeyPatch) -> None:
    original = save_module.write_pieces

    def write(path: Path, *rest: Any, **options: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            return original(path, *rest, **options)
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(save_module, "write_pieces", write)


def test_a_background_failure_stops_the_run_at_the_next_step(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_in_background(monkeypatch)
    config = run_config(corpus, tmp_path, checkpoint={"every": 2, "asynchronous": True})
    with pytest.raises(CheckpointError, match=r"rank 0: .* cannot be written: Read-only file system"):
        pretrain(config, None)
    assert len(records(config)) in (3, 4)
    assert names(config) == []


def test_a_background_failure_may_be_told_and_lived_with(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fail_in_background(monkeypatch)
    config = run_config(corpus, tmp_path, checkpoint={"every": 2, "asynchronous": True, "on_failure": "continue"})
    assert pretrain(config, None) == 0
    assert names(config) == ["step_00000006"]
    said = capfd.readouterr().err
    assert "no checkpoint, training goes on: 1 problem in" in said
    assert "Read-only file system" in said


def test_every_may_be_minutes(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a minute passes with each step that is logged: a minute after the start, and after the last save."""
    config = run_config(corpus, tmp_path, checkpoint={"every": "1 min"})
    metrics = Path(config.log.dir) / "metrics.jsonl"
    clock = SimpleNamespace(monotonic=lambda: 30.0 * (len(records(config)) if metrics.exists() else 0))
    monkeypatch.setattr("megascratch.engine.checkpoints.time", clock)
    assert pretrain(config, None) == 0
    assert names(config) == ["step_00000003", "step_00000006"]
    with pytest.raises(ConfigError, match=r"checkpoint\.every"):
        run_config(corpus, tmp_path, checkpoint={"every": "soon"})


def damage(path: Path) -> None:
    file = next(path.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-3] ^= 8
    file.write_bytes(data)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    corpus: Path, tmp_path: Path, straight: dict[int, float], capfd: pytest.CaptureFixture[str]
) -> None:
    stopped = run_config(corpus, tmp_path, checkpoint={"every": 2}, train={"stop_step": 4})
    assert pretrain(stopped, None) == 0
    damage(Path(str(stopped.checkpoint.dir)) / "step_00000004")
    assert pretrain(run_config(corpus, tmp_path, checkpoint={"every": 2}), None) == 0
    said = capfd.readouterr().err
    assert "do not match their checksum: they are damaged" in said
    assert "going back to" in said
    assert losses(stopped) == straight, "steps 3 and 4 were trained again, on the same samples"


def test_when_all_are_damaged_the_run_does_not_start(corpus: Path, tmp_path: Path) -> None:
    stopped = run_config(corpus, tmp_path, checkpoint={"every": 2}, train={"stop_step": 4})
    assert pretrain(stopped, None) == 0
    for path in complete_steps(Path(str(stopped.checkpoint.dir))):
        damage(path)
    with pytest.raises(CheckpointError, match="do not match their checksum"):
        pretrain(run_config(corpus, tmp_path), None)


def local_config(corpus: Path, folder: Path, **train: Any) -> Config:
    checkpoint = {"every": 2, "local_every": 1, "local_dir": str(folder / "ram")}
    sections = {"parallel": {"dp": 2, "zero": 1}, "train": {"dtype": "bf16", **train}, "eval": {"batches": 1}}
    return run_config(corpus, folder, checkpoint=checkpoint, **sections)


def test_local_copies_are_newer_and_exact(corpus: Path, tmp_path: Path) -> None:
    """Killed after step 3: its checkpoint is step 2, its local copies are step 3. Two ranks, ZeRO-1, bf16 masters."""
    with RankPool() as pool:
        reference = local_config(corpus, tmp_path / "reference")
        pool.run(2, pretrain_on_ranks, reference)
        killed = local_config(corpus, tmp_path, stop_step=3)
        pool.run(2, pretrain_on_ranks, killed)
        saved = Path(str(killed.checkpoint.dir))
        for name, what_happened, start in [("copies", None, 3), ("node", "rank_00001", 2), ("damage", "flip", 2)]:
            shutil.rmtree(saved / "step_00000003", ignore_errors=True)  # the save at the end did not happen
            (saved / "latest").write_text("step_00000002\n")
            copies = next((tmp_path / "ram").iterdir())
            for rank in range(2):
                shutil.rmtree(copies / f"rank_{rank:05d}/step_00000004", ignore_errors=True)
            if what_happened == "rank_00001":
                shutil.rmtree(copies / what_happened)
            elif what_happened == "flip":
                damage(copies / "rank_00000/step_00000003")
            before = len(records(killed))
            pool.run(2, pretrain_on_ranks, local_config(corpus, tmp_path, stop_step=4))
            assert records(killed)[before]["step"] == start + 1, name
            shutil.rmtree(saved / "step_00000004")
        assert losses(killed) == {step: loss for step, loss in losses(reference).items() if step <= 4}
    shutil.rmtree(tmp_path / "ram")


def said_when_rank_1_cannot_copy(config: Config) -> str:
    def save(root: Path, *arguments: Any, **options: Any) -> Path:
        if root.name == "rank_00001":
            raise CheckpointError(Problem(str(root), "is full [of other things]"))
        return save_module.save(root, *arguments, **options)

    with redirect_stderr(StringIO()) as said, patch("megascratch.engine.local_copies.save", save):
        pretrain_on_ranks(config)
    return said.getvalue()


def test_a_local_copy_that_fails_is_told_by_its_own_rank(corpus: Path, tmp_path: Path) -> None:
    with RankPool() as pool:
        first, second = pool.run(2, said_when_rank_1_cannot_copy, local_config(corpus, tmp_path, stop_step=1))
    assert "no local copy" not in first
    assert re.search(r"rank 1 on \S+: after step 1: no local copy: .*is full \[of other things\]", second, re.DOTALL)


def test_local_copies_of_another_run_do_not_count(corpus: Path, tmp_path: Path) -> None:
    sections = {"checkpoint": {"local_every": 1, "local_dir": str(tmp_path / "ram")}, "train": {"steps": 2}}
    first = run_config(corpus, tmp_path, **sections)
    assert pretrain(first, None) == 0
    shutil.rmtree(tmp_path / "run")  # the user starts again
    assert pretrain(first, None) == 0
    assert [record["step"] for record in records(first)] == [1, 2]


def test_a_run_may_save_behind_a_url_and_resume(corpus: Path, tmp_path: Path, straight: dict[int, float]) -> None:
    checkpoint = {"dir": "memory://test-run/checkpoints", "every": 2, "keep": 2, "asynchronous": True}
    stopped = run_config(corpus, tmp_path, checkpoint=checkpoint, train={"stop_step": 4})
    assert pretrain(stopped, None) == 0
    assert pretrain(run_config(corpus, tmp_path, checkpoint=checkpoint), None) == 0
    assert losses(stopped) == straight
    assert [record["step"] for record in records(stopped)] == [1, 2, 3, 4, 5, 6]
    assert names(stopped)[-1] == "step_00000006"
