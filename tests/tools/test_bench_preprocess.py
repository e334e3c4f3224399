"""tools/bench/preprocess.py runs on a small corpus, and does not compare tools that wrote different things."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "tools/bench/preprocess.py"

# Stands in for Megatron-LM's script: takes its flags, and copies what ours wrote.
SCRIPT = """
import argparse, shutil
parser = argparse.ArgumentParser()
for flag in ("input", "output-prefix", "workers", "tokenizer-type", "tokenizer-model", "log-interval"):
    parser.add_argument("--" + flag)
parser.add_argument("--append-eod", action="store_true")
flags = parser.parse_args()
ours = flags.output_prefix.replace("Megatron-LM", "megascratch")
for suffix in ("bin", "idx"):
    shutil.copy(f"{ours}_text_document.{suffix}", f"{flags.output_prefix}_text_document.{suffix}")
"""


@pytest.fixture
def bench():
    spec = importlib.util.spec_from_file_location("bench_preprocess", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_table(bench, tmp_path, capsys):
    (tmp_path / "tools").mkdir()
    script = tmp_path / "tools/preprocess_data.py"
    corpus = tmp_path / "corpus.jsonl"
    texts = [f"def function_{n}(path):\n    return open(path).read()\n" * (n % 9 + 1) for n in range(500)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments = ["--corpus", corpus, "--vocab-size", 300, "--repeats", 1, "--megatron", tmp_path]

    script.write_text(SCRIPT)
    bench.main(list(map(str, arguments)))
    printed = capsys.readouterr().out
    for row in ("megascratch", "Megatron-LM", "threads: 1", "threads: 2"):
        assert row in printed


def test_different_datasets_are_not_compared(bench, tmp_path):
    for name, tokens in (("a", b"same"), ("b", b"same"), ("c", b"other")):
        for suffix in ("bin", "idx"):
            (tmp_path / f"{name}_text_document.{suffix}").write_bytes(tokens)
    bench.require_same_bytes(tmp_path, ["a", "b"])
    with pytest.raises(SystemExit, match=r"the \.bin of a and c differ"):
        bench.require_same_bytes(tmp_path, ["a", "c"])


def test_the_standard_library_is_a_corpus(bench, tmp_path):
    bench.write_corpus(tmp_path / "a.jsonl", 1_000_000)
    texts = bench.texts_in(tmp_path / "a.jsonl")
    assert 900_000 < (tmp_path / "a.jsonl").stat().st_size < 3_000_000
    assert sum(len(block.ends) for block in texts) == len((tmp_path / "a.jsonl").read_text().splitlines())
