#!/usr/bin/env python3
"""Time two recipes to a validation loss on a text of characters: nanoGPT's for a CPU, and ours, one after the other.

    python tools/bench/time_to_loss.py --text TINYSHAKESPEARE --nanogpt NANOGPT

The model's size and the data are nanoGPT's: 4 layers, 4 heads, hidden 128, 64 tokens of context, the first nine tenths
of the text to train on and the last to validate. Its recipe is the one that its README gives for a CPU, 2,000 steps of
12 sequences; ours is examples/tinyshakespeare/pretrain.toml, run by `megascratch pretrain` on an indexed dataset with a
byte-level tokenizer, whose 257 ids are the bytes and an end of document: each of the text's 65 characters is one token.

Both times are of whole processes, from their start to their end: imports, building the model, all steps, every
validation, saving a checkpoint. Preparing the data is timed for neither. nanoGPT estimates its loss on 20 random
batches of 12; ours is the mean over the whole validation text, in pieces of 64 tokens.
"""

import argparse
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.table import Table

from megascratch.log import make_console

RECIPE = Path(__file__).parents[2] / "examples/tinyshakespeare/pretrain.toml"
MEGASCRATCH = Path(sys.executable).with_name("megascratch")
# As in the section "I only have a macbook" of nanoGPT's README.
NANOGPT_FLAGS = [
    "--device=cpu",
    "--compile=False",
    "--eval_iters=20",
    "--log_interval=100",
    "--block_size=64",
    "--batch_size=12",
    "--n_layer=4",
    "--n_head=4",
    "--n_embd=128",
    "--max_iters=2000",
    "--lr_decay_iters=2000",
    "--dropout=0.0",
]


def timed(command: list[str | Path], folder: Path) -> tuple[float, str]:
    """Run a command; return its seconds and what it printed. Exits with its message if it fails."""
    start = time.perf_counter()
    result = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if result.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{result.stderr or result.stdout}")
    return seconds, result.stdout


def run_nanogpt(text: Path, checkout: Path, folder: Path, python: str) -> tuple[float, float]:
    """Return the seconds of nanoGPT's recipe and its last validation loss."""
    copy = folder / "nanogpt"
    shutil.copytree(checkout, copy)
    shutil.copy(text, copy / "data/shakespeare_char/input.txt")
    timed([python, "data/shakespeare_char/prepare.py"], copy)
    seconds, printed = timed([python, "train.py", "config/train_shakespeare_char.py", *NANOGPT_FLAGS], copy)
    return seconds, float(re.findall(r"val loss ([\d.]+)", printed)[-1])


def prepare_ours(text: Path, folder: Path) -> None:
    """Write the text as ten documents, nine to train on, and index them."""
    characters = text.read_text(encoding="utf-8")
    n_train = int(0.9 * len(characters))
    ends = [n_train * part // 9 for part in range(10)] + [len(characters)]
    with (folder / "text.jsonl").open("w", encoding="utf-8") as file:
        for begin, end in itertools.pairwise(ends):
            file.write(json.dumps({"text": characters[begin:end]}) + "\n")
    timed(
        [MEGASCRATCH, "tokenizer", "train", "--vocab-size", "257", "--output", "tokenizer.json", "text.jsonl"], folder
    )
    inputs = ["--input", "text.jsonl", "--tokenizer", "tokenizer.json", "--output-prefix", "characters"]
    timed([MEGASCRATCH, "preprocess", *inputs], folder)


def run_ours(folder: Path, overrides: list[str]) -> tuple[float, float]:
    """Return the seconds of our recipe and its last validation loss."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    seconds, _ = timed([MEGASCRATCH, "pretrain", RECIPE, *overrides], folder)
    last = (folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    return seconds, json.loads(last)["valid_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="tinyshakespeare, as one text file")
    parser.add_argument("--nanogpt", type=Path, help="checkout of nanoGPT; left out, ours runs alone")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has nanoGPT's torch and requests")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("overrides", nargs="*", help="changes of our recipe, section.key=value")
    args = parser.parse_args()
    table = Table(title="whole processes, from start to end")
    for column in ("round", "nanoGPT, s", "its loss", "ours, s", "our loss", "nanoGPT / ours"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare_ours(args.text, folder)
        for number in range(1, args.rounds + 1):
            theirs = None
            if args.nanogpt is not None:
                theirs = run_nanogpt(args.text.resolve(), args.nanogpt, folder, args.python)
                shutil.rmtree(folder / "nanogpt")
            seconds, loss = run_ours(folder, args.overrides)
            peer = (f"{theirs[0]:.1f}", f"{theirs[1]:.4f}") if theirs else ("–", "–")
            ratio = f"{theirs[0] / seconds:.2f}" if theirs else "–"
            table.add_row(str(number), *peer, f"{seconds:.1f}", f"{loss:.4f}", ratio)
    make_console().print(table)


if __name__ == "__main__":
    main()
