"""A rank that is killed, stopped or hangs is named in time, and every other one ends cleanly."""

import re
import shutil
from pathlib import Path

import pytest
from broken_ranks import TIMEOUT_S, Break, run_broken
from fault_table import fault_of
from tiny_run import losses, run_config, write_corpus

from megascratch.config import Config
from megascratch.dist.testing import RankPool

PLACES = ("forward", "backward", "optimizer", "save")
_TO_END_S = 4.0  # to be told and to leave, for interpreters on a busy machine


def config_in(folder: Path) -> Config:
    return run_config(
        write_corpus(folder),
        folder,
        parallel={"dp": 2},
        train={"timeout_s": TIMEOUT_S, "steps": 4},
        checkpoint={"every": 1},
        eval={"batches": 1},
    )


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("what", ["kill", "stop", "hang"])
def test_a_lost_rank_is_named(what: str, place: str, tmp_path: Path) -> None:
    config = config_in(tmp_path)
    ended = run_broken(config, 2, Break(what, place), tmp_path / "ranks")
    told = [line for line in ended.said.splitlines() if line.startswith("rank 1 on")]
    assert len(told) == 1, ended
    fault_of(f"{what} in {place}").matches(told[0])
    assert ended.codes == [1, 1 if what == "hang" else -9]
    assert max(ended.seconds) < TIMEOUT_S + 1 + _TO_END_S
    assert "Traceback" not in ended.said


def test_a_run_goes_on_exactly_after_a_kill_in_save(tmp_path: Path, pool: RankPool) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    straight = config_in(whole)
    assert run_broken(straight, 2, None, whole / "ranks").codes == [0, 0]
    config = config_in(killed)
    run_broken(config, 2, Break("kill", "save"), killed / "ranks")
    assert run_broken(config, 2, None, killed / "again").codes == [0, 0]
    assert losses(config) == losses(straight)
    shutil.rmtree(killed)


def test_a_bug_on_one_rank_is_its_traceback_and_no_more(tmp_path: Path) -> None:
    ended = run_broken(config_in(tmp_path), 2, Break("raise", "forward"), tmp_path / "ranks")
    assert ended.codes == [1, 1]
    assert len(re.findall("Traceback", ended.said)) == 1
    fault_of("a bug on one rank").matches(re.findall(r"rank 1 failed", ended.said)[0])
