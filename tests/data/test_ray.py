"""`preprocess --engine ray` on this machine alone: the same bytes as the local engine."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from megascratch.data.indexed import bin_path, idx_path
from megascratch.data.preprocess import preprocess
from megascratch.data.ray_engine import in_order_on_ray
from megascratch.errors import DataError, MegascratchError, MissingDependency
from megascratch.tokenizer import train_from_texts

TEXTS = [f"document {n} " * (n % 9) for n in range(2000)]


def content(prefix: Path) -> bytes:
    return bin_path(prefix).read_bytes() + idx_path(prefix).read_bytes()


def die_at_five(number: int) -> int:
    """Kill the process at 5 as often as the file has bytes, at 9 always; refuse 7."""
    lives = Path(os.environ["MEGASCRATCH_TEST_LIVES"])
    if number == 9 or (number == 5 and lives.stat().st_size):
        os.truncate(lives, max(0, lives.stat().st_size - 1))
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 7:
        raise DataError([], "seven")
    return -number


def test_without_ray(tmp_path, tokenizer, quiet, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(MissingDependency, match=r"ray +is needed for --engine ray +pip install 'megascratch\[ray\]'"):
        preprocess([tmp_path / "a.jsonl"], tokenizer, tmp_path / "o", engine="ray", console=quiet)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.jsonl"]


def test_ray_gives_the_bytes_of_the_local_engine(tmp_path, quiet, small_parts, monkeypatch):
    """One test, since starting Ray takes long."""
    ray = pytest.importorskip("ray", reason="ray is not installed: it is too large for the test extra")
    (lives := tmp_path / "lives").write_bytes(b"xx")
    monkeypatch.setenv("MEGASCRATCH_TEST_LIVES", str(lives))
    tokenizer = train_from_texts(TEXTS, 400, console=quiet)
    for n in range(2):
        lines = [json.dumps({"text": text}) + "\n" for text in TEXTS[n * 1000 : n * 1000 + 1000]]
        (tmp_path / f"{n}.jsonl").write_text("".join(lines))
    ray.init(num_cpus=2, log_to_driver=False, logging_level="ERROR")
    try:
        for engine in ("local", "ray"):
            preprocess(
                [f"{tmp_path}/*.jsonl"],
                tokenizer,
                tmp_path / engine,
                append_eod=True,
                engine=engine,
                workers=2,
                console=quiet,
            )
        assert content(tmp_path / "ray_text_document") == content(tmp_path / "local_text_document")

        with in_order_on_ray(die_at_five, 2) as apply:
            assert list(apply(range(7))) == [(n, -n) for n in range(7)]
            assert lives.stat().st_size == 0
            with pytest.raises(DataError, match="seven"):
                list(apply([7]))
            with pytest.raises(MegascratchError, match="9: 3 workers died at it"):
                list(apply([9]))
    finally:
        ray.shutdown()
