"""A model learns to add by being told right or wrong: SFT on the form of an answer, then GRPO, and PPO beside it.

    python examples/assistant/arithmetic/arithmetic.py [SEED]

The SFT examples are sums with answers drawn at random, so the model that GRPO and PPO begin with writes a number and
ends, and is right once in twenty times. The verifier compares numbers; nobody shows the model a right sum. Every step
is a `megascratch` command, printed before it runs. Two CPU cores need a few minutes for each method.
"""

import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent.resolve()
FOLDER = Path("assistant/arithmetic")  # relative to the root of the repository
MEGASCRATCH = Path(sys.executable).with_name("megascratch")
LARGEST = 9


def main() -> None:
    """Run the steps, and print the share of right answers before and after."""
    os.chdir(HERE.parents[2])
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 1234
    shutil.rmtree(FOLDER, ignore_errors=True)  # the example's own: runs in it would be resumed
    write_data(seed)
    tokenizer = FOLDER / "tokenizer.json"
    megascratch(
        "tokenizer", "train", "--vocab-size", 257, "--output", tokenizer, FOLDER / "sft.jsonl", "--json-key", "prompt"
    )
    recipes = HERE.relative_to(Path.cwd())
    megascratch("sft", recipes / "sft.toml", f"train.seed={seed}")
    rows = [("SFT on random answers", share("sft"), 0.0)]
    for method in ("grpo", "ppo"):
        started = time.perf_counter()
        megascratch(method, recipes / f"{method}.toml", f"train.seed={seed}")
        rows.append((method.upper(), share(method), time.perf_counter() - started))
    print(f"\n{'':24}{'right':>8}{'minutes':>9}")
    for name, right, seconds in rows:
        print(f"{name:24}{right:>8.1%}{seconds / 60:>9.1f}")


def write_data(seed: int) -> None:
    """Write sums with random answers, prompts with right ones, and all sums as questions."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    source = random.Random(seed)
    sums = [(a, b) for a in range(LARGEST + 1) for b in range(LARGEST + 1)]
    shown = [(a, b, source.randint(0, 2 * LARGEST)) for _ in range(40) for a, b in sums]
    write("sft", [{"prompt": f"{a}+{b}=", "completion": str(c)} for a, b, c in shown])
    asked = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in sums]
    write("prompts", asked)


def write(name: str, records: list[dict[str, str]]) -> None:
    """Write a file of JSON Lines."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (FOLDER / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def share(run: str) -> float:
    """Return the share of all sums that a run's last checkpoint gets right, by its likeliest tokens."""
    checkpoints, questions = FOLDER / run / "checkpoints", FOLDER / "prompts.jsonl"
    out = megascratch("eval", checkpoints, "--questions", questions, "--max-tokens", 4, "--batch", 100, quiet=True)
    return float(out.split("exact_match")[1].split()[0])


def megascratch(*arguments: object, quiet: bool = False) -> str:
    """Run a command; its output is shown, or returned where it is to be quiet."""
    command = [str(MEGASCRATCH), *map(str, arguments)]
    print("$", shlex.join(["megascratch", *command[1:]]), flush=True)
    finished = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE if quiet else None)
    return finished.stdout or ""


if __name__ == "__main__":
    main()
