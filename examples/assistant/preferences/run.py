#!/usr/bin/env python3
"""Preferences with a planted truth: can a reward model and DPO find out what makes an answer better?

    python examples/assistant/preferences/run.py --seeds 1 2 3

Answers are six words out of sixty. Each word is worth something that nobody is told, and of two answers the one worth
more is preferred. A tiny model learns to give such answers (sft), then to tell which of two is better (reward), and to
prefer the better ones (dpo). What counts is how often both are right on pairs that they were not trained on.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

from megascratch.align.methods import METHODS
from megascratch.cli.align import configured
from megascratch.engine import train
from megascratch.log import make_console
from megascratch.tokenizer import train_from_texts

HERE = Path(__file__).parent
N_WORDS, N_PAIRS, LENGTH = 60, 3000, 6
TOPICS = ("the sea", "a house", "the night", "bread", "a journey")


def write_data(folder: Path, seed: int) -> None:
    """Write pairs, the same answers as demonstrations, and a tokenizer of their words."""
    source = random.Random(seed)
    letters = "bdfgklmnprst", "aeiou"
    words = [" " + "".join(source.choice(letters[i % 2]) for i in range(5)) for _ in range(N_WORDS)]
    worth = {word: source.gauss(0.0, 1.0) for word in words}

    def answer() -> list[str]:
        return [source.choice(words) for _ in range(LENGTH)]

    pairs, shown = [], []
    for _ in range(N_PAIRS):
        prompt = f"Say something about {source.choice(TOPICS)}:"
        better, worse = sorted((answer(), answer()), key=lambda a: sum(worth[word] for word in a), reverse=True)
        pairs.append({"prompt": prompt, "chosen": "".join(better), "rejected": "".join(worse)})
        shown += [{"prompt": prompt, "completion": "".join(one)} for one in (better, worse)]
    for name, records in (("pairs", pairs), ("shown", shown)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    texts = [record["prompt"] + record["completion"] for record in shown]
    train_from_texts(texts, vocab_size=400, console=make_console(1)).save(folder / "tokenizer.json")


def run(verb: str, folder: Path, seed: int) -> dict[str, float]:
    """Train by a recipe beside this file, and return what validation found at its end."""
    overrides = [
        f"data.paths=['{folder / ('shown' if verb == 'sft' else 'pairs')}.jsonl']",
        f"data.tokenizer={folder / 'tokenizer.json'}",
        f"log.dir={folder / verb}",
        f"train.seed={seed}",
        "log.every=1000",
        "eval.batches=100",
    ]
    if verb != "sft":
        overrides.append(f"checkpoint.init={folder / 'sft/checkpoints'}")
    assert train(configured(verb, HERE / f"{verb}.toml", overrides, None), None, METHODS[verb].open) == 0
    return json.loads((folder / verb / "metrics.jsonl").read_text().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    seeds = parser.parse_args().seeds
    lines = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_data(folder, seed)
            run("sft", folder, seed)
            reward, dpo = run("reward", folder, seed), run("dpo", folder, seed)
        judged, error = reward["valid_accuracy"], reward["valid_calibration_error"]
        lines.append(f"{seed:4} {judged:15.1%} {error:18.3f} {dpo['valid_rewards/accuracies']:12.1%}")
        lines[-1] += f" {dpo['valid_rewards/margins']:12.3f}"
    print(f"{'seed':>4} {'reward model':>15} {'calibration error':>18} {'DPO':>12} {'margin':>12}", *lines, sep="\n")


if __name__ == "__main__":
    main()
