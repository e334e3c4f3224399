"""Interruption: nothing is lost and nothing is doubled when a worker or the whole run dies, at any point."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megascratch.data.indexed import IndexedDataset, bin_path, idx_path
from megascratch.data.preprocess import preprocess
from megascratch.data.workers import in_order
from megascratch.errors import DataError, MegascratchError

TEXTS = [f"document {n} " * (n % 9) for n in range(2000)]


@pytest.fixture
def corpus(tmp_path) -> Path:
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return file


@pytest.fixture
def expected(corpus, tokenizer, quiet) -> bytes:
    preprocess([corpus], tokenizer, corpus.with_name("whole"), append_eod=True, console=quiet)
    return content(corpus.with_name("whole_text_document"))


def content(prefix: Path) -> bytes:
    return bin_path(prefix).read_bytes() + idx_path(prefix).read_bytes()


class Flaky:
    """A tokenizer that kills its process, or fails, when it meets a mark; as often as the file has bytes."""

    def __init__(self, tokenizer, mark: str, lives: Path, how: str) -> None:
        self._tokenizer, self._mark, self._lives, self._how = tokenizer, mark, lives, how

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def encode_documents(self, text, ends):
        if self._mark.encode() in text.tobytes() and self._lives.stat().st_size:
            os.truncate(self._lives, self._lives.stat().st_size - 1)
            if self._how == "raise":
                raise RuntimeError("the power went")
            os.kill(os.getpid(), signal.SIGKILL)
        return self._tokenizer.encode_documents(text, ends)


def test_a_worker_that_is_killed_costs_nothing(corpus, expected, tokenizer, quiet, small_parts):
    (lives := corpus.with_name("lives")).write_bytes(b"xx")
    flaky = Flaky(tokenizer, "document 777 ", lives, "kill")
    summary = preprocess([corpus], flaky, corpus.with_name("out"), append_eod=True, workers=2, console=quiet)
    assert lives.stat().st_size == 0
    assert content(corpus.with_name("out_text_document")) == expected
    assert summary.n_documents == len(TEXTS)


def test_what_kills_three_workers_is_reported_and_resumed(corpus, expected, tokenizer, quiet, small_parts):
    (lives := corpus.with_name("lives")).write_bytes(b"xxx")
    flaky = Flaky(tokenizer, "document 1777 ", lives, "kill")
    out = corpus.with_name("out")
    with pytest.raises(
        MegascratchError, match=r"part \d+ \(.*corpus\.jsonl\): 3 worker processes died .* add --resume"
    ):
        preprocess([corpus], flaky, out, append_eod=True, workers=2, console=quiet)
    assert not list(corpus.parent.glob("out_*"))
    preprocess([corpus], flaky, out, append_eod=True, workers=3, resume=True, console=quiet)
    assert content(corpus.with_name("out_text_document")) == expected


@pytest.mark.parametrize("damaged", ["bin", "lengths"])
def test_resume_makes_only_what_is_missing(corpus, expected, tokenizer, quiet, small_parts, monkeypatch, damaged):
    (lives := corpus.with_name("lives")).write_bytes(b"x")
    flaky = Flaky(tokenizer, "document 1000 ", lives, "raise")
    out, parts = corpus.with_name("out"), corpus.with_name("out.parts")
    with pytest.raises(RuntimeError, match="the power went"):
        preprocess([corpus], flaky, out, append_eod=True, console=quiet)
    n_finished = len(list(parts.glob("0*.json")))
    assert n_finished > 3
    with pytest.raises(DataError, match=f"left {n_finished} finished parts +add --resume to continue it"):
        preprocess([corpus], tokenizer, out, append_eod=True, console=quiet)

    file = parts / f"0000002_text.{damaged}"
    file.write_bytes(bytes(file.stat().st_size))  # as a power cut leaves it
    made = []
    import megascratch.data.preprocess as module

    monkeypatch.setattr(module, "encode_part", lambda *options: made.append(options[-1].number) or real(*options))
    from megascratch.data.encode_part import encode_part as real

    preprocess([corpus], tokenizer, out, append_eod=True, resume=True, console=quiet)
    assert made[0] == 2
    assert content(corpus.with_name("out_text_document")) == expected
    assert not parts.exists()


@pytest.mark.parametrize("change", ["input files", "append_eod", "tokenizer", "json keys"])
def test_parts_of_another_run_are_refused(corpus, tokenizer, quiet, small_parts, change):
    (lives := corpus.with_name("lives")).write_bytes(b"x")
    flaky = Flaky(tokenizer, "document 1000 ", lives, "raise")
    options = {"append_eod": True, "json_keys": ("text",)}
    with pytest.raises(RuntimeError):
        preprocess([corpus], flaky, corpus.with_name("out"), console=quiet, **options)
    if change == "input files":
        os.utime(corpus, (1, 1))
    elif change == "append_eod":
        options["append_eod"] = False
    elif change == "json keys":
        options["json_keys"] = ("title",)
    else:
        tokenizer.vocabulary = type(tokenizer.vocabulary)("other bytes")
    with pytest.raises(DataError, match=f"was begun with other {change} "):
        preprocess([corpus], tokenizer, corpus.with_name("out"), resume=True, console=quiet, **options)
    if change == "json keys":
        return
    summary = preprocess([corpus], tokenizer, corpus.with_name("out"), overwrite=True, console=quiet, **options)
    assert summary.n_documents == len(TEXTS)


def test_a_directory_that_is_not_ours_is_left_alone(corpus, tokenizer, quiet):
    (mine := corpus.with_name("out.parts")).mkdir()
    (mine / "0000001.thesis").write_text("mine")
    with pytest.raises(DataError, match=r"holds '0000001\.thesis', which is not ours"):
        preprocess([corpus], tokenizer, corpus.with_name("out"), overwrite=True, console=quiet)
    assert (mine / "0000001.thesis").read_text() == "mine"


RUN = """
import sys
from pathlib import Path
from megascratch.cli import main
import megascratch.data.sources, megascratch.data.parts
megascratch.data.sources.PIECE_BYTES = megascratch.data.parts.PIECE_BYTES = 1 << 16
sys.argv = ["megascratch", "preprocess", *sys.argv[1:]]
main()
"""


def test_a_run_that_is_killed_at_any_time_resumes(tmp_path, quiet):
    """SIGKILL to the whole run, again and again, until it gets through: the same bytes as in one go."""
    from megascratch.tokenizer import train_from_texts

    train_from_texts(TEXTS, 400, console=quiet).save(tmp_path / "tokenizer.json")
    random = np.random.default_rng(0)
    words = [text for text in TEXTS if text]
    with (tmp_path / "a.jsonl").open("w") as file:
        for _ in range(30_000):
            file.write(json.dumps({"text": words[random.integers(len(words))]}) + "\n")
    arguments = ["--input", tmp_path / "a.jsonl", "--tokenizer", tmp_path / "tokenizer.json", "--append-eod"]
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    subprocess.run([*command, "--output-prefix", tmp_path / "whole"], check=True, capture_output=True)
    killed = 0
    for _ in range(40):
        run = subprocess.Popen(
            [*command, "--output-prefix", tmp_path / "out", "--workers", "2", "--resume"],
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        n_before = len(list(tmp_path.glob("out.parts/0*.json")))
        deadline = time.monotonic() + 60
        while run.poll() is None and time.monotonic() < deadline and killed < 3:
            if len(list(tmp_path.glob("out.parts/0*.json"))) >= n_before + 2 + killed:
                os.killpg(run.pid, signal.SIGKILL)
                killed += 1
                break
            time.sleep(0.002)
        _, said = run.communicate(timeout=60)
        if run.returncode == 0:
            break
        assert run.returncode == -signal.SIGKILL, said
    assert killed >= 2
    assert content(tmp_path / "out_text_document") == content(tmp_path / "whole_text_document")
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out_text_document.bin", "out_text_document.idx"]


def exit_at_seven(number: int) -> int:
    if number == 7:
        os._exit(1)
    return number


def refuse_seven(number: int) -> int:
    if number == 7:
        raise ValueError("seven")
    return -number


def test_workers_keep_the_order_and_pass_errors_on():
    with in_order(refuse_seven, 3) as apply:
        assert list(apply(range(6))) == [(i, -i) for i in range(6)]
        with pytest.raises(ValueError, match="seven"):
            list(apply(range(20)))


def test_an_item_that_kills_every_worker_is_named():
    with in_order(exit_at_seven, 2) as apply, pytest.raises(MegascratchError, match="7: 3 worker processes died"):
        list(apply(range(20)))


def test_many_compressed_files_are_read_by_the_workers(tmp_path, corpus, expected, tokenizer, quiet):
    import gzip

    for n in range(20):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[n * 100 : n * 100 + 100])
        (tmp_path / f"{n:02}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    preprocess([f"{tmp_path}/*.gz"], tokenizer, tmp_path / "out", append_eod=True, workers=2, console=quiet)
    assert content(tmp_path / "out_text_document") == expected
    shutil.rmtree(tmp_path / "out.parts", ignore_errors=True)
    assert len(IndexedDataset(tmp_path / "out_text_document")) == sum(map(bool, TEXTS))
