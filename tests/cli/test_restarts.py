"""A run whose rank is killed is started again without a human, and ends with the losses of one that was left alone."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from tiny_run import losses, pretrain_on_ranks, run_config, write_corpus

from megascratch.config import Config, to_toml
from megascratch.dist.testing import run_ranks


def train(config: Config, recipe: Path, *options: str) -> subprocess.Popen[str]:
    recipe.write_text(to_toml(config))
    command = [sys.executable, "-m", "megascratch", "pretrain", str(recipe), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def test_a_killed_rank_costs_a_restart_and_no_sample(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    sections = {"parallel": {"dp": 2}, "train": {"steps": 60}, "checkpoint": {"every": 5, "keep": 2}}
    sections |= {"data": {"split": "100,0,0"}}
    straight = run_config(corpus, tmp_path / "straight", **sections)
    run_ranks(2, pretrain_on_ranks, straight)
    killed = run_config(corpus, tmp_path / "killed", **sections)
    process = train(killed, tmp_path / "killed.toml", "--max-restarts", "1")
    metrics, lock = Path(killed.log.dir) / "metrics.jsonl", Path(killed.log.dir) / "lock"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") > 11):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    holder = re.search(r"process (\d+)", lock.read_text())
    assert holder is not None
    os.kill(int(holder[1]), signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert "a rank has failed: restart 1 of 1" in said
    assert "resumed from" in said
    assert losses(killed) == losses(straight)
