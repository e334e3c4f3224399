#!/usr/bin/env python3
"""Time training, encoding and decoding against the installed peers, in turn, in one run, and check that outputs agree.

    python tools/bench/tokenizer.py                         everything, 100 MB
    python tools/bench/tokenizer.py --only encode --megabytes 20
    python tools/bench/tokenizer.py --only verify --verify-gb 1      ids against tiktoken's on a gigabyte

Every timing is a process of its own: CPU seconds of all its threads around the call alone, and its peak memory. All
tools have their turn, `--rounds` times; one that has taken more than `--budget` seconds has no further turn.

Encoders take a list of str, or bytes where they can, on one thread. In each turn a process makes ten new tokenizers
and lets each encode the text once. `first` is the first of these passes, the next four do not count, `cold` is the last
five (one, for tools that have taken ten seconds by then), and `warm` the last tokenizer with the same text again. A
first pass also pays for its memory. In a virtual machine whose host takes memory back, that is little in one round and
as much as the encoding in the next, whoever encodes: so it shows its best over all rounds. The cold passes find memory
that the process has been given already, and show their medians, as does the warm one. Training shows its best. Text:
sources and documents of this machine, and words made up in twelve scripts, drawn with the frequencies of a natural
language.

Peers: gigatoken, rustbpe, bpeasy, tokenizers, tiktoken, in this Python or, with --peers-python, in another; one that is
not installed is skipped with a line. All train with GPT-2's pattern; rustbpe and bpeasy break ties in their own way.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

NOT_INSTALLED = 3  # exit code of a worker without its tool
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
VOCABULARIES = {"cl100k": 100_256, "o200k": 199_998}
TRAINED = 32_000
SETTLING_PASSES, COLD_PASSES = 5, 5  # of one process
PASSES_S = 10.0  # after so many seconds one cold pass is enough
PEERS = {
    "train": ["megascratch", "gigatoken", "rustbpe", "tokenizers", "bpeasy"],
    "encode": ["megascratch", "megascratch, bytes", "gigatoken", "gigatoken, bytes", "tokenizers", "tiktoken"],
}
SCRIPTS = [(0x41, 0x24F, " "), (0x370, 0x3FF, " "), (0x400, 0x4FF, " "), (0x5D0, 0x5EA, " "), (0x620, 0x65F, " ")]
SCRIPTS += [(0x900, 0x96F, " "), (0xE01, 0xE59, ""), (0xAC00, 0xB200, " "), (0x3041, 0x30FF, ""), (0x4E00, 0x5800, "")]
SCRIPTS += [(0x10A0, 0x10FF, " "), (0x1F300, 0x1F64F, " ")]
TIKTOKEN_CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)


def files_here() -> Iterator[str]:
    """Yield the texts of this machine: Python's library, what is installed beside it, headers, documentation."""
    roots = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "/usr/share/doc", "/usr/include"]
    kinds = {".py", ".pyi", ".md", ".rst", ".txt", ".html", ".h", ".hpp", ".js", ".c"}
    paths = sorted({path for root in roots for path in Path(root).rglob("*") if path.suffix in kinds})
    random.Random(0).shuffle(paths)
    for path in paths:
        if path.is_file() and not path.is_symlink() and path.stat().st_size < 300_000:
            try:
                yield path.read_text("utf-8")
            except (UnicodeDecodeError, OSError):
                continue


def words_in_scripts(seed: int) -> Iterator[str]:
    """Yield made-up prose: words of a script drawn with Zipf's frequencies, in lines and sentences."""
    rng = random.Random(seed)
    lexicons = []
    for first, last, separator in SCRIPTS:
        letters = [chr(c) for c in range(first, last) if unicodedata.category(chr(c))[0] in "LMS"]
        lexicons.append((["".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(20_000)], separator))
    weights = np.cumsum(1 / np.arange(1, 20_001)).tolist()
    while True:
        lexicon, separator = rng.choice(lexicons)
        words = rng.choices(lexicon, cum_weights=weights, k=800)
        ends = rng.choices([separator, ", ", ". ", "\n", "\n\n", " 1984 "], weights=[80, 6, 6, 4, 2, 2], k=800)
        yield "".join(word + end for word, end in zip(words, ends))


def documents(seed: int) -> Iterator[str]:
    """Yield texts without end: four in five from this machine while they last, the rest made up."""
    here, made_up, rng = files_here(), words_in_scripts(seed), random.Random(seed)
    while True:
        text = next(here, None) if rng.random() < 0.8 else None
        yield text or next(made_up)


def write_corpus(path: Path, n_bytes: int) -> None:
    """Write documents as JSON Lines, the text under "text"."""
    with path.open("w") as out:
        for text in documents(seed=0):
            out.write(json.dumps({"text": text}) + "\n")
            n_bytes -= len(text.encode())
            if n_bytes <= 0:
                break


def read_corpus(path: Path) -> list[str]:
    with path.open() as lines:
        return [json.loads(line)["text"] for line in lines]


def digest_of_tokens(tokens: list[bytes]) -> str:
    """Identify the tokens learnt, in their order, the single bytes left out."""
    return hashlib.sha256(b"\n".join(token.hex().encode() for token in tokens if len(token) > 1)).hexdigest()[:12]


def digest_of_ids(parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.asarray(part, np.uint32).tobytes())
    return digest.hexdigest()[:12]


def clock(call: Callable[[], Any]) -> tuple[float, Any]:
    """Return the CPU seconds of all threads of this process during a call, and its result."""
    begun = time.process_time()
    result = call()
    return time.process_time() - begun, result


def train_worker(tool: str, corpus: Path) -> dict[str, Any]:
    """Train one tool; all but the first two are given texts that are in memory already."""
    texts = [] if tool in ("megascratch", "gigatoken") else read_corpus(corpus)
    if tool == "megascratch":
        from megascratch.log import make_console
        from megascratch.tokenizer import train

        cpu_s, made = clock(lambda: train([corpus], TRAINED, "gpt2", (), console=make_console(rank=1)))
        tokens = list(made.vocabulary.tokens)
    elif tool == "gigatoken":
        from gigatoken.gigatoken_rs import JsonlFileSource, train_bpe

        cpu_s, (_, merges) = clock(lambda: train_bpe(JsonlFileSource([corpus]), TRAINED, []))
        tokens = [left + right for left, right in merges]
    elif tool == "tokenizers":
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=TRAINED, initial_alphabet=alphabet, show_progress=False)
        cpu_s, _ = clock(lambda: made.train_from_iterator(texts, trainer))
        from megascratch.tokenizer.alphabet import to_bytes

        tokens = [to_bytes("".join(merge)) for merge in json.loads(made.to_str())["model"]["merges"]]
    elif tool == "rustbpe":
        import rustbpe

        made = rustbpe.Tokenizer()
        cpu_s, _ = clock(lambda: made.train_from_iterator(iter(texts), TRAINED, pattern=GPT2))
        tokens = [bytes(token) for token, _ in made.get_mergeable_ranks()]
    else:
        import bpeasy

        cpu_s, made = clock(lambda: bpeasy.train_bpe(iter(texts), GPT2, 1 << 20, TRAINED))
        tokens = sorted(made, key=made.get)
    return {"cpu_s": cpu_s, "digest": digest_of_tokens(tokens)}


def encode_worker(tool: str, corpus: Path, pattern: str, threads: int) -> dict[str, Any]:
    """Encode with new tokenizers, one after the other, then once more with the last of them, warm."""
    given = input_of(tool, read_corpus(corpus))
    n_passes = SETTLING_PASSES + COLD_PASSES
    encoders = [encoder_of(tool, given, corpus, pattern, threads) for _ in range(n_passes)]
    cpu_s, wall_s = [], []
    while encoders:
        encode = encoders.pop()  # and what the one before held is free
        begun = time.perf_counter()
        seconds, made = clock(encode)
        wall_s.append(time.perf_counter() - begun)
        cpu_s.append(seconds)
        digest = digest_of_ids(made)
        del made
        if sum(cpu_s) > PASSES_S and len(cpu_s) > 1:
            break
    n_settling = min(SETTLING_PASSES, len(cpu_s) - 1)
    cold_s = cpu_s[n_settling:]
    timed = {"first_s": cpu_s[:1], "cold_s": cold_s, "warm_s": [clock(encode)[0]]}
    return timed | {"first_wall_s": wall_s[:1], "wall_s": wall_s[n_settling:], "digest": digest}


def input_of(tool: str, texts: list[str]) -> Any:
    """Return the texts as a tool takes them."""
    if tool == "megascratch, bytes":
        utf8 = [text.encode() for text in texts]
        return b"".join(utf8), np.cumsum([len(text) for text in utf8])
    if tool == "gigatoken, bytes":
        import gigatoken

        return gigatoken.BytesSource([text.encode() for text in texts])
    return texts


def encoder_of(tool: str, given: Any, corpus: Path, pattern: str, threads: int) -> Callable[[], Any]:
    """Make a tokenizer of a tool; return what encodes all texts with it."""
    ranks = corpus.with_name(f"{pattern}.tiktoken")
    if tool.startswith("megascratch"):
        from megascratch.tokenizer import Tokenizer

        ours = Tokenizer.from_tiktoken(ranks, pattern, {})
        if tool == "megascratch":
            return lambda: ours.encode_batch(given, threads=threads)
        return lambda: [ours.encode_documents(*given, threads=threads)[0]]
    if tool.startswith("gigatoken"):
        import gigatoken

        theirs = gigatoken.Tokenizer.from_tiktoken(ranks, pattern).backend
        return lambda: theirs.encode_batch(given, parallel=False)
    if tool == "tokenizers":
        import tokenizers

        hugging = tokenizers.Tokenizer.from_file(str(corpus.with_name(f"{pattern}.json")))
        return lambda: [made.ids for made in hugging.encode_batch_fast(given, add_special_tokens=False)]
    oracle = tiktoken_of(ranks, pattern)
    return lambda: oracle.encode_ordinary_batch(given, num_threads=1)


def tiktoken_of(ranks: Path, pattern: str) -> Any:
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    from megascratch.tokenizer import PATTERNS

    expression = TIKTOKEN_CL100K if pattern == "cl100k" else PATTERNS[pattern]
    return tiktoken.Encoding(
        pattern, pat_str=expression, mergeable_ranks=load_tiktoken_bpe(str(ranks)), special_tokens={}
    )


def measure(python: str, task: str, tool: str, *rest: str, threads: int | None = None) -> dict[str, Any] | None:
    """Run one worker in its own process; None where the tool is not installed there."""
    command = [python, __file__, "--worker", task, tool, *rest]
    limits = {} if threads is None else {"RAYON_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | limits)
    if done.returncode == NOT_INSTALLED:
        return None
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def worker(task: str, tool: str, corpus: str, *rest: str) -> int:
    if importlib.util.find_spec(tool.partition(",")[0]) is None:
        return NOT_INSTALLED
    if task == "train":
        result = train_worker(tool, Path(corpus))
    else:
        result = encode_worker(tool, Path(corpus), rest[0], int(rest[1]))
    result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(result))
    return 0


Results = dict[str, list[dict[str, Any]]]


def turns(runs: dict[str, Callable[[], dict[str, Any] | None]], rounds: int, budget_s: float) -> Results:
    """Go round the tools in turn, leaving out who has had its time; return what each turn of each gave."""
    results: Results = {name: [] for name in runs}
    spent = dict.fromkeys(runs, 0.0)
    for _ in range(rounds):
        for name, run in runs.items():
            if spent[name] > budget_s:
                continue
            begun = time.perf_counter()
            result = run()
            spent[name] += time.perf_counter() - begun
            if result is None:
                print(f"{name} is not installed: skipped")
                spent[name] = float("inf")
            else:
                results[name].append(result)
    return {name: of_tool for name, of_tool in results.items() if of_tool}


def all_of(of_tool: list[dict[str, Any]], key: str) -> list[float]:
    return [value for turn in of_tool for value in turn[key]]


def python_of(tool: str, peers_python: str) -> str:
    return sys.executable if tool.startswith(("megascratch", "tokenizers", "tiktoken")) else peers_python


def bench_train(corpus: Path, args: argparse.Namespace) -> Table:
    def run(tool: str) -> Callable[[], dict[str, Any] | None]:
        return lambda: measure(python_of(tool, args.peers_python), "train", tool, str(corpus))

    results = turns({tool: run(tool) for tool in args.tools or PEERS["train"]}, args.rounds, args.budget)
    best = {tool: min(of_tool, key=lambda result: result["cpu_s"]) for tool, of_tool in results.items()}
    ours = best["megascratch"]
    table = Table(
        title=f"training {TRAINED:,} ids, GPT-2's pattern, {corpus.stat().st_size / 1e6:.0f} MB of JSON Lines"
    )
    for column in ("", "CPU s", "ours is", "peak MB", "same merges"):
        table.add_column(column, justify="right")
    for tool, result in best.items():
        same = "yes" if result["digest"] == ours["digest"] else "no"
        ratio = f"{result['cpu_s'] / ours['cpu_s']:.2f}×"
        table.add_row(tool, f"{result['cpu_s']:.2f}", ratio, f"{result['peak_mb']:.0f}", same)
    return table


def bench_encode(corpus: Path, pattern: str, n_bytes: int, args: argparse.Namespace) -> Table:
    def run(tool: str, threads: int = 1) -> Callable[[], dict[str, Any] | None]:
        rest = (str(corpus), pattern, str(threads))
        return lambda: measure(python_of(tool, args.peers_python), "encode", tool, *rest, threads=threads)

    ours, ours_twice = "megascratch, bytes", "2 threads"
    runs = {tool: run(tool) for tool in args.tools or PEERS["encode"]}
    results = turns(runs | {ours: run(ours), ours_twice: run(ours, 2)}, args.rounds, args.budget)
    shown = {"first_s": min, "cold_s": statistics.median, "warm_s": statistics.median, "wall_s": statistics.median}
    took = {tool: {key: show(all_of(of_tool, key)) for key, show in shown.items()} for tool, of_tool in results.items()}

    def two_threads(key: str, show: Callable[[list[float]], float]) -> str:
        return f"{show(all_of(results[ours], key)) / show(all_of(results[ours_twice], key)):.2f}×"

    table = Table(
        title=f"encoding, {VOCABULARIES[pattern]:,} ids, {pattern}, {n_bytes / 1e6:.0f} MB of text, in MB a CPU second",
        caption=f"two threads in wall time: {two_threads('first_wall_s', min)} one in the best first passes, cold "
        f"{two_threads('wall_s', statistics.median)} by the medians and {two_threads('wall_s', min)} by the best",
    )
    columns = (
        "",
        "rounds",
        "first",
        "ours is",
        "cold",
        "ours is",
        "warm",
        "ours is",
        "cold MB/s",
        "peak MB",
        "same ids",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for tool, of_tool in results.items():
        row = [tool, str(len(of_tool))]
        for key in ("first_s", "cold_s", "warm_s"):
            row += [f"{n_bytes / took[tool][key] / 1e6:.0f}", f"{took[tool][key] / took[ours][key]:.2f}×"]
        same = {result["digest"] for result in of_tool} == {result["digest"] for result in results[ours]}
        peak_mb = max(result["peak_mb"] for result in of_tool)
        row += [f"{n_bytes / took[tool]['wall_s'] / 1e6:.0f}", f"{peak_mb:.0f}", "yes" if same else "NO"]
        table.add_row(*row)
    return table


def bench_decode(corpus: Path) -> str:
    from megascratch.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_tiktoken(corpus.with_name("cl100k.tiktoken"), "cl100k", {})
    text = "".join(read_corpus(corpus)).encode()
    ids, _ = tokenizer.encode_documents(text, np.array([len(text)]))
    seconds, back = min((clock(lambda: tokenizer.decode_bytes(ids)) for _ in range(3)), key=lambda timed: timed[0])
    assert back == text
    return (
        f"decoding: {len(text) / seconds / 1e6:.0f} MB/s, {len(ids) / seconds / 1e6:.0f} million ids/s, bytes identical"
    )


def train_vocabularies(corpus: Path) -> None:
    """Learn the ranks that all encoders are given, and write them for each."""
    from megascratch.tokenizer import train

    for pattern, vocab_size in VOCABULARIES.items():
        made = train([corpus], vocab_size, pattern, ())
        made.save_tiktoken(corpus.with_name(f"{pattern}.tiktoken"))
        made.save(corpus.with_name(f"{pattern}.json"))


def verify(folder: Path, n_bytes: int) -> None:
    """Compare ids with tiktoken's, document by document, on text most of which no vocabulary was trained on."""
    from megascratch.tokenizer import Tokenizer

    pairs = []
    for pattern in VOCABULARIES:
        ranks = folder / f"{pattern}.tiktoken"
        pairs.append((pattern, Tokenizer.from_tiktoken(ranks, pattern, {}), tiktoken_of(ranks, pattern)))
    done = n_documents = 0
    for n, text in enumerate(documents(seed=1)):
        pattern, ours, oracle = pairs[n % len(pairs)]
        if ours.encode(text) != oracle.encode_ordinary(text):
            sys.exit(f"ids differ from tiktoken's: {pattern}, document {n}")
        done += len(text.encode())
        n_documents += 1
        if done >= n_bytes:
            break
    print(f"verified: ids are tiktoken's on {done / 1e9:.2f} GB, {n_documents:,} documents, {', '.join(VOCABULARIES)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=60, help="seconds after which a tool has no further turn")
    parser.add_argument(
        "--tools",
        nargs="+",
        choices=sorted({*PEERS["train"], *PEERS["encode"]}),
        help="only these, by the names in the tables",
    )
    parser.add_argument(
        "--patterns", nargs="+", choices=VOCABULARIES, default=list(VOCABULARIES), help="to encode with"
    )
    parser.add_argument("--only", choices=["train", "encode", "decode", "verify"])
    parser.add_argument("--verify-gb", type=float, default=0, help="compare ids with tiktoken's on this much text")
    parser.add_argument("--peers-python", default=sys.executable, help="a Python with gigatoken, rustbpe and bpeasy")
    parser.add_argument(
        "--folder", type=Path, help="keep the corpus and vocabularies here, and use those that are there"
    )
    args = parser.parse_args()
    console = Console(width=120)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        corpus = folder / "corpus.jsonl"
        if not corpus.exists():
            write_corpus(corpus, int(args.megabytes * 1e6))
        if args.only in (None, "train"):
            console.print(bench_train(corpus, args))
        if args.only == "train":
            return
        if not all((folder / f"{pattern}.json").exists() for pattern in VOCABULARIES):
            train_vocabularies(corpus)
        n_bytes = sum(len(text.encode()) for text in read_corpus(corpus))
        for pattern in args.patterns if args.only in (None, "encode") else ():
            console.print(bench_encode(corpus, pattern, n_bytes, args))
        if args.only in (None, "decode"):
            print(bench_decode(corpus))
        if args.verify_gb:
            verify(folder, int(args.verify_gb * 1e9))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        sys.exit(worker(*sys.argv[2:]))
    main()
