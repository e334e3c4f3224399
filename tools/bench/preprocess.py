#!/usr/bin/env python3
"""Time `megascratch preprocess` against Megatron-LM's tools/preprocess_data.py: JSON Lines to .bin and .idx.

Both run as a user would run them, in turn, on the same corpus and the same tokenizer (ours exports the folder that
Megatron's HuggingFaceTokenizer opens), and must write the same bytes. Processor time is that of all processes; memory
is the largest sum over them at any moment. Each tool also runs on one line, and that is taken off: start-up is seconds
for either, and nothing in a corpus of terabytes.

Beside them stands the tokenizer alone, on the same texts in memory, in the same blocks: on one thread, and on as many
threads as there are workers. It too starts cold, a new tokenizer each time; as many threads are as many cold caches, as
in the workers. So what a share of `preprocess` is encoding reads from the row with as many threads, in wall and in
processor time; against one thread, the second cold cache counts as our loss.

Best and median are those of all rounds. A process whose memory the host of a virtual machine has taken back pays for it
again at the first touch, up to a third of a run here, as it happens: so the best is the steadier.

    python tools/bench/preprocess.py --megatron ~/Megatron-LM --megatron-python ~/megatron-venv/bin/python

Without --megatron, only ours is timed. The corpus is Python's own standard library unless one is given.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megascratch.data.batch import Texts
from megascratch.data.sources import batch_of_lines
from megascratch.log import make_console
from megascratch.tokenizer import Tokenizer, train_from_texts

_RAW_BLOCK_BYTES = 1 << 20
OURS, MEGATRON = "megascratch", "Megatron-LM"


@dataclass(frozen=True)
class Run:
    """What one run of a tool took: wall and processor seconds, and peak memory in MB."""

    wall_s: float
    cpu_s: float
    memory_mb: float

    def without(self, start_up: "Run") -> "Run":
        """Return the run without its start-up."""
        return Run(self.wall_s - start_up.wall_s, self.cpu_s - start_up.cpu_s, self.memory_mb)


def write_corpus(path: Path, n_bytes: int) -> None:
    """Write the sources of the standard library as JSON Lines, each once while they last."""
    size = 0
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    with path.open("w") as corpus:
        while size < n_bytes:
            for file in files:
                if text := file.read_text(errors="replace"):
                    size += corpus.write(json.dumps({"text": text}) + "\n")
                if size >= n_bytes:
                    return


def texts_in(corpus: Path) -> list[Texts]:
    """Read the texts of a corpus in blocks of about a megabyte."""
    blocks, lines, size = [], [], 0
    with corpus.open("rb") as file:
        for line in file:
            lines.append(line)
            size += len(line)
            if size >= _RAW_BLOCK_BYTES:
                blocks.append(batch_of_lines(b"".join(lines), ["text"]).by_key[0])
                lines, size = [], 0
    if lines:
        blocks.append(batch_of_lines(b"".join(lines), ["text"]).by_key[0])
    return blocks


def raw_encode(tokenizer: Tokenizer, blocks: list[Texts], threads: int) -> Run:
    """Encode texts, each thread a block at a time, with a new tokenizer, so that it starts cold."""
    fresh = Tokenizer(tokenizer.vocabulary)
    with ThreadPoolExecutor(threads) as pool:
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in pool.map(lambda texts: fresh.encode_documents(*texts), blocks):
            pass
        return Run(time.perf_counter() - wall, time.process_time() - cpu, 0.0)


def resident_mb(root: int) -> float:
    """Return the memory of a process and its descendants, what they share counted once."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    total, family = 0, [root]
    while family:
        process = family.pop()
        family += children.get(process, [])
        try:
            lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total / 1000


def timed(command: list[str], environment: dict[str, str]) -> Run:
    """Run a command and measure it with all its processes."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    peak = [0.0]

    def watch() -> None:
        while process.returncode is None:
            peak[0] = max(peak[0], resident_mb(process.pid))
            time.sleep(0.2)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - begin
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{said.decode(errors='replace')[-2000:]}")
    return Run(seconds, usage.ru_utime + usage.ru_stime, peak[0])


def commands(flags: argparse.Namespace, tokenizer: Path, output: Path) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Return what runs each tool, up to its input and output."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ours = [sys.executable, "-m", "megascratch", "preprocess", "--tokenizer", str(tokenizer / "tokenizer.json")]
    tools = {OURS: ([*ours, "--overwrite"], environment)}
    if flags.megatron is not None:
        script = [
            str(flags.megatron_python),
            str(flags.megatron / "tools/preprocess_data.py"),
            "--log-interval",
            "1000000",
        ]
        kind = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer)]
        tools[MEGATRON] = ([*script, *kind], environment | {"PYTHONPATH": str(flags.megatron)})
    return tools


def compare(flags: argparse.Namespace, folder: Path, console: Console) -> tuple[dict[str, list[Run]], int]:
    """Return each tool's runs, those of the tokenizer alone among them, and the bytes of text."""
    corpus = flags.corpus or folder / "corpus.jsonl"
    if flags.corpus is None:
        write_corpus(corpus, int(flags.megabytes * 1e6))
    blocks = texts_in(corpus)
    n_bytes = sum(len(texts.utf8) for texts in blocks)
    console.print(f"train a tokenizer of {flags.vocab_size:,} ids on 10 MB")
    sample = [blocks[n].utf8.tobytes().decode() for n in range(0, len(blocks), max(1, len(blocks) // 10))]
    tokenizer = train_from_texts(sample, flags.vocab_size, console=make_console(rank=1))
    tokenizer.save(folder / "tokenizer")
    (folder / "line.jsonl").write_text('{"text": "one line"}\n')

    tools = commands(flags, folder / "tokenizer", folder)
    runs: dict[str, list[Run]] = {name: [] for name in tools}
    for n in range(flags.repeats):
        for name, (command, environment) in tools.items():
            if n >= (flags.megatron_repeats if name == MEGATRON else flags.repeats):
                continue
            console.print(f"run {name}")
            options = ["--append-eod", "--workers", str(flags.workers), "--output-prefix"]
            start_up, run = (
                timed([*command, "--input", str(source), *options, str(folder / name)], environment)
                for source in (folder / "line.jsonl", corpus)
            )
            runs[name].append(run.without(start_up))
        for threads in sorted({1, flags.workers}):
            runs.setdefault(f"encode, threads: {threads}", []).append(raw_encode(tokenizer, blocks, threads))
    require_same_bytes(folder, list(tools))
    return runs, n_bytes


def require_same_bytes(folder: Path, tools: list[str]) -> None:
    """Stop when two tools wrote different datasets."""
    for suffix in ("bin", "idx"):
        written = {(folder / f"{name}_text_document.{suffix}").read_bytes() for name in tools}
        if len(written) != 1:
            raise SystemExit(f"the .{suffix} of {' and '.join(tools)} differ")


def report(runs: dict[str, list[Run]], n_bytes: int, workers: int) -> Table:
    """Build the table of the best and the median run of each tool, and ratios to ours."""
    table = Table(title=f"{n_bytes / 1e6:,.0f} MB of text, {workers} workers")
    for column in ("", "rounds", "", "wall s", "MB/s", "CPU s", "MB/CPU s", "peak MB", "time, ours = 1"):
        table.add_column(column, justify="left" if column == "" else "right")
    for which, pick in (("best", min), ("median", statistics.median)):
        ours = Run(*map(pick, zip(*map(astuple, runs[OURS]))))
        for name, of_tool in runs.items():
            wall_s, cpu_s, memory_mb = map(pick, zip(*map(astuple, of_tool)))
            cells = [
                f"{wall_s:,.2f}",
                f"{n_bytes / 1e6 / wall_s:,.0f}",
                f"{cpu_s:,.2f}",
                f"{n_bytes / 1e6 / cpu_s:,.0f}",
            ]
            cells += [f"{memory_mb:,.0f}" if memory_mb else ""]
            ratio = f"{cpu_s / ours.cpu_s:.2f} CPU, {wall_s / ours.wall_s:.2f} wall"
            table.add_row(name, str(len(of_tool)), which, *cells, ratio)
    return table


def main(argv: list[str]) -> None:
    """Compare, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, help="JSON Lines with the key text; the standard library when left out")
    parser.add_argument("--megabytes", type=float, default=50, help="of the standard library")
    parser.add_argument("--megatron", type=Path, help="a checkout of Megatron-LM")
    parser.add_argument("--megatron-python", type=Path, default=sys.executable, help="an interpreter that can run it")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--vocab-size", type=int, default=32000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--megatron-repeats", type=int, default=1, help="it takes minutes, and its ratio is no close one"
    )
    flags = parser.parse_args(argv)
    console = make_console()
    with tempfile.TemporaryDirectory() as folder:
        runs, n_bytes = compare(flags, Path(folder), console)
    Console(width=120).print(report(runs, n_bytes, flags.workers))


if __name__ == "__main__":
    main(sys.argv[1:])
