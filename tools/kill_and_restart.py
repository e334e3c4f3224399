#!/usr/bin/env python3
"""Kill ranks at random moments under --max-restarts, and compare how each run ends with one that was left alone.

    python tools/kill_and_restart.py --kills 100 --seed 1

A small model trains in float64 on two ranks and saves after every step. As often as `megascratch pretrain
--max-restarts 4` starts the ranks again, one of them, drawn at random, is killed (SIGKILL) at a random moment of
starting or of training. Nobody helps: each launch must end with 0, with the losses of all steps and the last
checkpoint's pieces bit for bit those of the run that was left alone. What counts is restarts: a kill that comes when
the ranks are done is none.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from tiny_run import difference_of_bits, saving_config, write_corpus

from megascratch.config import Config, to_toml

STEPS, RANKS, RESTARTS = 40, 2, 4
_PATIENCE_S = 600.0  # on a busy machine, for ranks to start, and for the first step


@dataclass(frozen=True)
class Pace:
    """How long an undisturbed run takes to its first step, and from there to its last."""

    starts_s: float
    trains_s: float


class Launch:
    """A launcher that runs, and its ranks."""

    def __init__(self, config: Config, folder: Path) -> None:
        folder.mkdir()
        recipe = folder / "run.toml"
        recipe.write_text(to_toml(config))
        self.metrics, self._said = Path(config.log.dir) / "metrics.jsonl", folder / "said"
        command = [sys.executable, "-m", "megascratch", "pretrain", str(recipe), f"--max-restarts={RESTARTS}"]
        with self._said.open("w") as said:
            self.process = subprocess.Popen(command, stdout=said, stderr=said)
        self._seen: set[int] = set()

    def next_ranks(self) -> list[int]:
        """Return the processes of the next attempt, once all are there; none if there is no further one."""
        deadline = time.monotonic() + _PATIENCE_S
        while self.process.poll() is None and time.monotonic() < deadline:
            new = [pid for pid in _ranks_of(self.process.pid) if pid not in self._seen]
            if len(new) == RANKS:
                self._seen.update(new)
                return new
            time.sleep(0.01)
        return []

    def steps_logged(self) -> int:
        return self.metrics.read_text().count("\n") if self.metrics.exists() else 0

    def wait_for_step(self) -> None:
        """Wait until one more step is logged, or the launcher ends."""
        before, deadline = self.steps_logged(), time.monotonic() + _PATIENCE_S
        while self.steps_logged() == before and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)

    def restarts(self) -> int:
        return self._said.read_text().count("a rank has failed: restart")

    def end(self) -> str:
        """Wait for the launcher; return what it said if it failed."""
        code = self.process.wait(_PATIENCE_S)
        return f"exit code {code}: {self._said.read_text()[-2000:]}" if code else ""


def _ranks_of(launcher: int) -> list[int]:
    """Return the launcher's children that run ranks; another one tracks its shared memory."""
    with suppress(OSError):
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
        return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return []


def undisturbed(config: Config, folder: Path) -> Pace:
    """Run to the end, and return how long it took."""
    launch, start = Launch(config, folder), time.monotonic()
    launch.wait_for_step()
    first = time.monotonic()
    assert not (failed := launch.end()), failed
    return Pace(first - start, time.monotonic() - first)


def kill_at_random(launch: Launch, pace: Pace, kills: int, draw: random.Random) -> None:
    """Kill ranks of one launch, so many times at most."""
    for _ in range(kills):
        if not (ranks := launch.next_ranks()):
            return
        if draw.random() < 0.5:
            moment_s = draw.uniform(0, pace.starts_s)
        else:
            launch.wait_for_step()
            moment_s = draw.uniform(0, pace.trains_s / RESTARTS)
        try:
            launch.process.wait(moment_s)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.kill(draw.choice(ranks), signal.SIGKILL)


def run(kills: int, seed: int) -> tuple[int, list[str]]:
    """Return how many restarts there were, and what went wrong after them."""
    draw, wrong, done = random.Random(seed), [], 0
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        corpus = write_corpus(root)
        straight = saving_config(corpus, root / "straight", 0, STEPS, RANKS)
        pace = undisturbed(straight, root / "straight")
        number = 0
        while done < kills:
            folder = root / f"{number}"
            config = saving_config(corpus, folder, number, STEPS, RANKS)
            launch = Launch(config, folder)
            kill_at_random(launch, pace, min(RESTARTS, kills - done), draw)
            difference = launch.end() or difference_of_bits(config, straight, STEPS)
            if difference:
                wrong.append(f"launch {number}, {launch.restarts()} restarts: {difference}")
            done, number = done + launch.restarts(), number + 1
            print(f"{done} restarts in {number} launches, {len(wrong)} went wrong", file=sys.stderr, flush=True)
    return done, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    restarts, wrong = run(arguments.kills, arguments.seed)
    print("\n".join([*wrong, f"{restarts} restarts, {len(wrong)} launches that did not end as they should"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
