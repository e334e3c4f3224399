#!/usr/bin/env python3
"""Kill training at random moments, resume it, and compare with a run that was left alone.

    python tools/kill_and_resume.py --kills 500 --seed 1

A small model trains in float64 and saves after every step, asynchronously in half of the trials, and in half of both
over the files of checkpoints that are no longer kept. Each trial is killed by the kernel at a random moment of its own
length and started again: on the same layout its losses and its last checkpoint's pieces must be the same bits; every
tenth trial resumes on dp 2, where losses must agree to 1e-9.
"""

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from rich.console import Console
from rich.progress import track
from tiny_run import difference_of_bits, losses, pretrain_on_ranks, saving_config, write_corpus

from megascratch.config import Config
from megascratch.dist.testing import RankDied, RankPool

STEPS = 6
PATIENCE_S = 600.0  # on a busy machine


def train_until(config: Config, moment_s: float) -> None:
    """Train on the ranks of a pool, unless the kernel ends the process first (SIGALRM, which nobody handles)."""
    signal.setitimer(signal.ITIMER_REAL, moment_s)
    pretrain_on_ranks(config)
    signal.setitimer(signal.ITIMER_REAL, 0)


def dies(config: Config, moment_s: float, pool: RankPool) -> bool:
    """Train until the process is killed; returns whether that was before the end."""
    try:
        pool.run(1, train_until, config, moment_s, timeout_s=PATIENCE_S)
    except RankDied:
        return True
    return False


def difference(again: Config, straight: Config, pool: RankPool) -> str:
    """Resume a killed run, and return what differs from the straight one: nothing, if all is well."""
    ranks = again.parallel.dp
    pool.run(ranks, pretrain_on_ranks, again, timeout_s=PATIENCE_S)
    if ranks == 1:
        return difference_of_bits(again, straight, STEPS)
    got, want = losses(again), losses(straight)
    same = got.keys() == want.keys() and all(abs(got[s] - want[s]) <= 1e-9 * abs(want[s]) for s in want)
    return "" if same else f"losses on dp {ranks}: {got}"


def run(kills: int, seed: int) -> list[str]:
    """Return what went wrong in so many trials. A run that ends before its moment comes is not one."""
    draw, wrong = random.Random(seed), []
    with tempfile.TemporaryDirectory() as name, RankPool() as pool:
        root = Path(name)
        corpus = write_corpus(root)
        straight = saving_config(corpus, root / "straight", 0, STEPS, 1)
        patiently = partial(pool.run, 1, pretrain_on_ranks, timeout_s=PATIENCE_S)
        patiently(straight)  # what is imported on the way costs the first run alone
        start = time.monotonic()
        patiently(saving_config(corpus, root / "timed", 0, STEPS, 1))
        whole_s = time.monotonic() - start
        for number in track(range(kills), console=Console(stderr=True)):
            config = partial(saving_config, corpus, root / "killed", number, STEPS)
            while not dies(config(dp=1), moment_s := draw.uniform(0, whole_s), pool):
                shutil.rmtree(root / "killed")
            if differs := difference(config(dp=2 if number % 10 == 9 else 1), straight, pool):
                wrong.append(f"trial {number}, killed after {moment_s:.3f} s: {differs}")
                print(wrong[-1], file=sys.stderr)
            shutil.rmtree(root / "killed")
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
