"""The tools with Megatron-LM's flags: its command lines run, and what can't be honoured is said."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from megascratch.data.indexed import IndexedDataset
from megascratch.tokenizer import Tokenizer, train_from_texts

TOOLS = Path(__file__).parents[2] / "tools"
TEXTS = ["def read_lines(path):", "return the lines of a file", "read the file"] * 5


def tool(name: str):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def corpus(tmp_path, quiet) -> Path:
    train_from_texts(TEXTS, 280, console=quiet).save(tmp_path / "tokenizer.json")
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": name + text}) + "\n" for text in TEXTS))
    return tmp_path


def flags(corpus: Path, *more: str) -> list[str]:
    """A command line as Megatron's documentation writes it."""
    return [
        *("--input", f"{corpus}/a.jsonl", "--output-prefix", f"{corpus}/out", "--workers", "1", "--append-eod"),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", f"{corpus}/tokenizer.json"),
        *more,
    ]


def texts_of(corpus: Path, prefix: Path) -> list[str]:
    tokenizer, dataset = Tokenizer.from_file(corpus / "tokenizer.json"), IndexedDataset(prefix)
    assert all(dataset[i][-1] == tokenizer.eod_id for i in range(len(dataset)))
    return [tokenizer.decode(dataset[i][:-1].tolist()) for i in range(len(dataset))]


def test_preprocess(corpus, capsys):
    assert tool("preprocess_data").main(flags(corpus)) == 0
    assert texts_of(corpus, corpus / "out_text_document") == ["a" + text for text in TEXTS]
    printed = capsys.readouterr().out
    assert "out_text_document: 15 documents" in printed
    assert "documents/s" in printed


def test_preprocess_with_partitions_and_a_pattern(corpus, capsys):
    more = ["--partitions", "2", "--log-interval", "100", "--vocab-size", "280", "--keep-sequential-samples"]
    arguments = flags(corpus, *more)
    arguments[1] = f"{corpus}/*.jsonl"
    assert tool("preprocess_data").main(arguments) == 0
    assert texts_of(corpus, corpus / "out_text_document") == [name + text for name in "ab" for text in TEXTS]
    said = capsys.readouterr().err
    for flag in ("--partitions", "--log-interval", "--vocab-size"):
        assert f"note: {flag} has no effect" in said


def test_preprocess_with_gpt2_files(corpus, capsys):
    document = json.loads((corpus / "tokenizer.json").read_text())
    ids = document["model"]["vocab"] | {token["content"]: token["id"] for token in document["added_tokens"]}
    (corpus / "vocab.json").write_text(json.dumps(ids))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in document["model"]["merges"]]
    (corpus / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    pair = ["--vocab-file", f"{corpus}/vocab.json", "--merge-file", f"{corpus}/merges.txt"]
    arguments = flags(corpus, *pair)
    arguments[arguments.index("HuggingFaceTokenizer")] = "GPT2BPETokenizer"
    assert tool("preprocess_data").main(arguments) == 0
    assert texts_of(corpus, corpus / "out_text_document") == ["a" + text for text in TEXTS]

    (corpus / "vocab.json").write_text("[]")
    assert tool("preprocess_data").main([*arguments, "--overwrite"]) == 2
    assert "is not GPT-2's vocab.json" in capsys.readouterr().err
    assert tool("preprocess_data").main([*arguments, "--overwrite", "--merge-file", "/none"]) == 2
    assert "/none" in capsys.readouterr().err


def test_bad_lines_are_fatal_or_skipped(corpus, capsys):
    with (corpus / "a.jsonl").open("a") as file:
        file.write("{broken\n")
    assert tool("preprocess_data").main(flags(corpus)) == 2
    assert "line 16" in capsys.readouterr().err
    assert not list(corpus.glob("out_*"))
    assert tool("preprocess_data").main(flags(corpus, "--on-error", "skip")) == 2
    assert "left 1 finished parts" in capsys.readouterr().err
    assert tool("preprocess_data").main(flags(corpus, "--on-error", "skip", "--resume")) == 0
    assert "a.jsonl: 1 bad lines left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--split-sentences"], "sentence splitting is not supported"),
        (["--find-optimal-num-workers"], "--find-optimal-num-workers"),
        (["--tokenizer-type", "TikTokenizer"], "must be HuggingFaceTokenizer or GPT2BPETokenizer"),
        (["--tokenizer-type", "GPT2BPETokenizer"], "needs --vocab-file and --merge-file"),
        (["--tokenizer-model", "org/name"], "nothing is downloaded"),
        (["--tokenizer-model", ""], "--tokenizer-model  is missing"),
        (["--input", "/none/*.jsonl"], "no such file or directory"),
        (["--workers", "0"], "must be at least 1"),
    ],
)
def test_what_preprocess_refuses(corpus, capsys, more, message):
    assert tool("preprocess_data").main(flags(corpus, *more)) == 2
    assert message in capsys.readouterr().err
    assert not list(corpus.glob("out*"))


def test_merge(corpus, capsys):
    (corpus / "parts").mkdir()
    for name in "ba":
        arguments = flags(corpus)
        arguments[1], arguments[3] = f"{corpus}/{name}.jsonl", f"{corpus}/parts/{name}"
        assert tool("preprocess_data").main(arguments) == 0
    merge = ["--input", f"{corpus}/parts", "--output-prefix", f"{corpus}/whole"]
    assert tool("merge_datasets").main(merge) == 0
    assert texts_of(corpus, corpus / "whole") == [name + text for name in "ab" for text in TEXTS]
    assert "whole: 30 documents" in capsys.readouterr().out

    assert tool("merge_datasets").main(merge) == 2
    assert "exists already" in capsys.readouterr().err
    assert tool("merge_datasets").main([*merge, "--overwrite", "--multimodal"]) == 2
    assert "has no modes" in capsys.readouterr().err
    (corpus / "parts" / "a_text_document.idx").unlink()
    assert tool("merge_datasets").main([*merge, "--overwrite"]) == 2
    assert "a_text_document.idx" in capsys.readouterr().err
    for directory, message in ((corpus / "none", "no such directory"), (TOOLS, "holds no .bin and no .idx")):
        assert tool("merge_datasets").main(["--input", str(directory), "--output-prefix", f"{corpus}/m"]) == 2
        assert message in capsys.readouterr().err


def test_a_user_error_ends_with_code_2_and_no_traceback(corpus):
    script = [sys.executable, TOOLS / "preprocess_data.py", *flags(corpus, "--input", f"{corpus}/none.jsonl")]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "none.jsonl" in done.stderr
    assert "Traceback" not in done.stderr
