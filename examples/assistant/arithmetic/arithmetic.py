"""A model learns to add by being told right or wrong: SFT on the form of an answer, then GRPO, and PPO beside it.

    python examples/assistant/arithmetic/arithmetic.py --seeds 1234 1 2

The SFT examples are sums with answers drawn at random, so the model that GRPO and PPO begin with writes a number and
ends, and is right once in twenty times. The verifier compares numbers; nobody shows the model a right sum.

A third run, `held`, is PPO for answers that end in 0 or 5, a lesson so easy that the model would soon say nothing else.
Its divergence from the beginning is held at a target, by steering what divergence costs: so far it may go, no further.

Every step is a `megascratch` command, printed before it runs. A method needs one to two minutes of one core; each run
uses one thread, since more only wait for each other on so small a model.
"""

import argparse
import json
import os
import random
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent.resolve()
FOLDER = Path("assistant/arithmetic")  # relative to the root of the repository
MEGASCRATCH = Path(sys.executable).with_name("megascratch")
LARGEST = 9
KL_TARGET = 0.5  # nats a completion
HELD = (
    "rollout.scores=[{kind='regex', pattern='[05]$'}]",
    f"ppo.kl_target={KL_TARGET}",
    "ppo.kl_horizon=5000",
    "ppo.kl_coeff=0.3",
    "train.steps=400",
    "optim.schedule=constant",
)
RUNS = {"grpo": ("grpo", ()), "ppo": ("ppo", ()), "held": ("ppo", HELD)}


def main() -> None:
    """Run the steps for each seed, and print the shares of right answers before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1234])
    parser.add_argument("--runs", nargs="*", default=list(RUNS), choices=RUNS)
    args = parser.parse_args()
    os.chdir(HERE.parents[2])
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = []
    for seed in args.seeds:
        rows += learn(seed, args.runs)
    print(f"\n{'seed':>6}  {'run':6}{'before':>8}{'after':>8}{'reward':>8}{'KL':>8}{'CPU min':>9}{'minutes':>9}")
    print(*rows, sep="\n")
    print("before, after: share of right sums, by the likeliest tokens; reward and KL: means of the last half, KL in")
    print(f"nats a completion, and of `held` to be {KL_TARGET}")


def learn(seed: int, runs: list[str]) -> list[str]:
    """Run all steps with a seed, and return a row of the table for each run."""
    shutil.rmtree(FOLDER, ignore_errors=True)  # the example's own: runs in it would be resumed
    write_data(seed)
    tokenizer = FOLDER / "tokenizer.json"
    megascratch(
        "tokenizer", "train", "--vocab-size", 257, "--output", tokenizer, FOLDER / "sft.jsonl", "--json-key", "prompt"
    )
    train("sft", seed)
    before, rows = share("sft"), []
    for run in runs:
        method, overrides = RUNS[run]
        wall, cpu = time.perf_counter(), cpu_seconds()
        train(method, seed, f"log.dir={FOLDER / run}", *overrides)
        minutes, cpu_minutes = (time.perf_counter() - wall) / 60, (cpu_seconds() - cpu) / 60
        rows.append(
            f"{seed:6}  {run:6}{before:8.0%}{share(run):8.0%}{mean(run, 'reward'):8.2f}{divergence(run):8.2f}"
            f"{cpu_minutes:9.1f}{minutes:9.1f}"
        )
        print(rows[-1], flush=True)
    return rows


def write_data(seed: int) -> None:
    """Write sums with random answers, prompts with right ones, and all sums as questions."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    source = random.Random(seed)
    sums = [(a, b) for a in range(LARGEST + 1) for b in range(LARGEST + 1)]
    shown = [(a, b, source.randint(0, 2 * LARGEST)) for _ in range(40) for a, b in sums]
    write("sft", [{"prompt": f"{a}+{b}=", "completion": str(c)} for a, b, c in shown])
    write("prompts", [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in sums])


def write(name: str, records: list[dict[str, str]]) -> None:
    """Write a file of JSON Lines."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (FOLDER / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def train(method: str, seed: int, *overrides: str) -> None:
    """Train by a recipe beside this file."""
    megascratch(method, HERE.relative_to(Path.cwd()) / f"{method}.toml", f"train.seed={seed}", *overrides)


def share(run: str) -> float:
    """Return the share of all sums that a run's last checkpoint gets right, by its likeliest tokens."""
    checkpoints, questions = FOLDER / run / "checkpoints", FOLDER / "prompts.jsonl"
    out = megascratch("eval", checkpoints, "--questions", questions, "--max-tokens", 4, "--batch", 100, quiet=True)
    return float(out.split("exact_match")[1].split()[0])


def divergence(run: str) -> float:
    """Return the mean divergence of a completion from the beginning, in nats; GRPO has it of tokens."""
    if run == "grpo":
        return mean(run, "kl") * mean(run, "completions/mean_length")
    return mean(run, "objective/kl")


def mean(run: str, name: str) -> float:
    """Return the mean of a metric over the last half of a run, as far as its steps have it."""
    steps = [json.loads(line) for line in (FOLDER / run / "metrics.jsonl").read_text().splitlines()]
    return statistics.mean(step[name] for step in steps[len(steps) // 2 :] if name in step)


def megascratch(*arguments: object, quiet: bool = False) -> str:
    """Run a command; its output is shown, or returned where it is to be quiet."""
    command = [str(MEGASCRATCH), *map(str, arguments)]
    print("$", shlex.join(["megascratch", *command[1:]]), flush=True)
    finished = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE if quiet else None)
    return finished.stdout or ""


def cpu_seconds() -> float:
    """Return the processor's time that all commands so far have taken."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
