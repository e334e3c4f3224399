#!/usr/bin/env python3
"""Kill training at random moments, resume it, and compare with a run that was left alone.

    python tools/kill_and_resume.py --kills 500 --seed 1

A small model trains in float64 and saves after every step, asynchronously in half of the trials. Each trial is killed
(SIGKILL) at a random moment of its own length and started again: on the same layout its losses and its last
checkpoint's pieces must be the same bits; every tenth trial resumes on dp 2, where losses must agree to 1e-9.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from tiny_run import losses, pretrain_on_ranks, run_config, write_corpus

from megascratch.config import Config
from megascratch.dist.testing import RankPool
from megascratch.engine import pretrain

STEPS = 6


def config_in(corpus: Path, folder: Path, asynchronous: bool, dp: int = 1) -> Config:
    """Return the recipe of one trial."""
    return run_config(
        corpus,
        folder,
        parallel={"dp": dp},
        train={"dtype": "fp64", "steps": STEPS},
        checkpoint={"every": 1, "keep": 2, "asynchronous": asynchronous},
        eval={"batches": 1},
        data={"split": "100,0,0"},
    )


def train_in_child(config: Config, kill_after_s: float | None) -> float:
    """Train in a forked process, and kill it after a while; returns how long it took."""
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            os._exit(pretrain(config, None))
        finally:
            os._exit(1)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert kill_after_s is not None or status == 0, f"training failed: {status}"
    return time.monotonic() - start


def pieces(config: Config) -> list[bytes]:
    """Return the pieces of the last checkpoint."""
    folder = Path(str(config.checkpoint.dir)) / f"step_{STEPS:08d}"
    return [file.read_bytes() for file in sorted(folder.glob("*.safetensors"))]


def trial(corpus: Path, folder: Path, straight: Config, moment_s: float, number: int, pool: RankPool) -> str:
    """Kill a run, resume it, and return what differs from the straight one: nothing, if all is well."""
    config = config_in(corpus, folder, asynchronous=number % 2 == 1)
    train_in_child(config, moment_s)
    if number % 10 == 9:
        pool.run(2, pretrain_on_ranks, config_in(corpus, folder, asynchronous=False, dp=2))
        got, want = losses(config), losses(straight)
        same = got.keys() == want.keys() and all(abs(got[s] - want[s]) <= 1e-9 * abs(want[s]) for s in want)
        return "" if same else f"losses on dp 2: {got}"
    train_in_child(config, None)
    if losses(config) != losses(straight):
        return f"losses: {losses(config)}"
    return "" if pieces(config) == pieces(straight) else "the last checkpoint's bits"


def run(kills: int, seed: int) -> list[str]:
    """Return what went wrong in so many trials."""
    torch.set_num_threads(1)
    draw, wrong = random.Random(seed), []
    with tempfile.TemporaryDirectory() as name, RankPool() as pool:
        root = Path(name)
        corpus = write_corpus(root)
        straight = config_in(corpus, root / "straight", asynchronous=False)
        whole_s = train_in_child(straight, None)
        for number in range(kills):
            moment_s = draw.uniform(0, whole_s)
            if difference := trial(corpus, root / f"{number}", straight, moment_s, number, pool):
                wrong.append(f"trial {number}, killed after {moment_s:.3f} s: {difference}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    wrong = run(arguments.kills, arguments.seed)
    print("\n".join([*wrong, f"{len(wrong)} of {arguments.kills} resumed runs differ"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
