"""Fixtures of the command-line tests."""

import json

import pytest
from command_line import Files, Finished, Run, exit_code


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs a verb in this process and returns how it ended."""

    def run_verb(*arguments: object) -> Finished:
        capfd.readouterr()
        code = exit_code(*arguments)
        out, err = capfd.readouterr()
        return Finished(code, out, err)

    return run_verb


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Make a corpus of 200 documents, a tokenizer of 300 ids and a dataset, through the verbs themselves."""
    folder = tmp_path_factory.mktemp("cli")
    corpus, tokenizer, prefix = folder / "corpus.jsonl", folder / "tokenizer.json", folder / "small"
    texts = [f"def function_{n}(path):\n    return open(path).read()  # number {n}\n" for n in range(200)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert exit_code("tokenizer", "train", "--vocab-size", 300, "--output", tokenizer, corpus) == 0
    inputs = ["--input", corpus, "--tokenizer", tokenizer]
    assert exit_code("preprocess", *inputs, "--output-prefix", prefix, "--append-eod") == 0
    return Files(corpus, tokenizer, folder / "small_text_document")
