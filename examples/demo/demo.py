"""The whole way, once: raw text → tokenizer → .bin/.idx → pretraining → another layout → convert → generate.

    make demo

Every step is a `megascratch` command, printed before it runs: type it yourself to run it again. Everything is written
under demo/. Two CPU cores need about six minutes; where there are four GPUs, they are used.
"""

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megascratch.checkpoint import describe

HERE = Path(__file__).parent.resolve()
ROOT = HERE.parents[1]
FOLDER = Path("demo")  # relative to ROOT, so that the printed commands stay short
RECIPE = HERE.relative_to(ROOT) / "pretrain.toml"
MEGASCRATCH = Path(sys.executable).with_name("megascratch")
N_RANKS = 4
HALF_WAY = 240
PROMPT = "def read_lines(path):"

console = Console(highlight=False, soft_wrap=True)


def main() -> None:
    """Run the steps, then say what came of them."""
    os.chdir(ROOT)
    started = time.perf_counter()
    # The folder is the demo's own, made anew each time: no command below replaces what exists.
    shutil.rmtree(FOLDER, ignore_errors=True)
    environment = environment_of_commands()

    def megascratch(*arguments: object) -> None:
        run("megascratch", [MEGASCRATCH, *arguments], environment)

    say("1. A corpus: the source and documentation of Python's standard library")
    run("python", [sys.executable, HERE.relative_to(ROOT) / "corpus.py", FOLDER / "corpus.jsonl"], environment)

    say("2. A tokenizer: byte-level BPE with 8,192 ids")
    tokenizer = FOLDER / "tokenizer.json"
    megascratch("tokenizer", "train", "--vocab-size", 8192, "--output", tokenizer, FOLDER / "corpus.jsonl")

    say("3. Token ids in Megatron's .bin and .idx")
    inputs = ["--input", FOLDER / "corpus.jsonl", "--tokenizer", tokenizer, "--output-prefix", FOLDER / "stdlib"]
    megascratch("preprocess", *inputs, "--append-eod", "--workers", 2)

    say(f"4. Pretraining on tp 2 × pp 2, {N_RANKS} processes, stopped half-way")
    megascratch("pretrain", RECIPE, f"train.stop_step={HALF_WAY}")

    say(f"5. The same run resumed on tp 1 × pp 2 × dp 2, {N_RANKS} processes")
    megascratch("pretrain", RECIPE, "parallel.tp=1", "parallel.pp=2", "parallel.dp=2")

    say("6. The checkpoint for one rank, and for Hugging Face")
    checkpoints = FOLDER / "run/checkpoints"
    megascratch("convert", checkpoints, FOLDER / "one_rank", "--tp", 1, "--pp", 1, "--weights-only")
    megascratch("convert", checkpoints, FOLDER / "hf", "--to", "hf")

    say("7. A completion")
    sampling = ["--max-tokens", 100, "--temperature", 0.7, "--top-k", 50, "--seed", 1]
    megascratch("generate", FOLDER / "one_rank", "--prompt", PROMPT, *sampling)

    summarize(time.perf_counter() - started)


def environment_of_commands() -> dict[str, str]:
    """Return the environment of the commands: GPUs are hidden where there are too few for one a process."""
    tool = shutil.which("nvidia-smi")
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True).stdout if tool else ""
    n_gpus = listed.count("GPU ")
    if 0 < n_gpus < N_RANKS:
        console.print(f"The demo starts {N_RANKS} processes and needs a GPU for each: it runs on the CPU instead.")
        return {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return dict(os.environ)


def say(headline: str) -> None:
    """Print the headline of a step."""
    console.print(f"\n[bold]{headline}[/bold]")


def run(name: str, command: list[object], environment: dict[str, str]) -> None:
    """Print a command and run it; end the demo with its exit code where it fails."""
    words = [str(word) for word in command]
    console.print(f"$ {shlex.join([name, *words[1:]])}", style="cyan", markup=False)
    started = time.perf_counter()
    code = subprocess.run(words, env=environment).returncode
    if code:
        console.print(f"the demo ends here: {name} returned {code}", style="red")
        sys.exit(code)
    console.print(f"  {time.perf_counter() - started:.0f} s", style="dim")


def summarize(seconds: float) -> None:
    """Print what was trained, how well it predicts, and where everything lies."""
    records = [json.loads(line) for line in (FOLDER / "run/metrics.jsonl").read_text().splitlines()]
    checkpoint = describe(FOLDER / "run/checkpoints")
    last = records[-1]
    table = Table(title="\nWhat came of it", title_justify="left", show_header=False, box=None)
    table.add_row("parameters", f"{checkpoint.n_parameters:,}")
    table.add_row("trained on", f"{last['tokens']:,} tokens in {last['step']} steps")
    table.add_row("speed", f"{speed(records[:HALF_WAY])} on tp 2 × pp 2, {speed(records[HALF_WAY:])} on pp 2 × dp 2")
    table.add_row(
        "validation loss", f"{last['valid_loss']:.3f} nats/token, {last['valid_bits_per_byte']:.3f} bits/byte"
    )
    table.add_row("wall time", f"{seconds / 60:.1f} minutes")
    console.print(table)
    for name, path, hint in (
        ("corpus", "corpus.jsonl", "one JSON object a document"),
        ("tokenizer", "tokenizer.json", "megascratch inspect demo/tokenizer.json"),
        ("dataset", "stdlib_text_document", "megascratch inspect demo/stdlib_text_document --tokenizer demo"),
        ("metrics", "run/metrics.jsonl", "one JSON object a step; or: tensorboard --logdir demo/run"),
        ("checkpoints", "run/checkpoints", "megascratch inspect demo/run/checkpoints --verify"),
        ("for one rank", "one_rank", "megascratch generate demo/one_rank --prompt 'class Parser'"),
        ("for Hugging Face", "hf", "AutoModelForCausalLM.from_pretrained('demo/hf')"),
    ):
        console.print(f" {name:<16}  {FOLDER / path!s:<26}  [dim]{hint}[/dim]")
    console.print(f"\nNext: change {RECIPE} and run it again, or read megascratch/engine/trainer.py.")


def speed(records: list[dict[str, Any]]) -> str:
    """Return the usual speed of some steps; the median passes over the first ones, which warm up."""
    return f"{statistics.median(record['tokens_per_s'] for record in records):,.0f} tokens/s"


if __name__ == "__main__":
    main()
