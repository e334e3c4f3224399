"""Shared by the data tests: a byte-level stand-in for a tokenizer, small datasets, and megatron-core's classes."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

from megascratch.data.indexed import token_dtype
from megascratch.data.writer import IndexedDatasetWriter
from megascratch.log import make_console

EOD = 256


@dataclass(frozen=True)
class ByteVocabulary:
    """What a plan of preprocessing tells tokenizers apart by."""

    name: str = "bytes"


class ByteTokenizer:
    """A token for each byte, and one for the end of a document."""

    vocabulary = ByteVocabulary()
    vocab_size = 257
    eod_id: int | None = EOD

    def encode_documents(
        self, text: NDArray[np.uint8], ends: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
        return text.astype(np.uint16), ends

    def decode(self, ids: list[int]) -> str:
        return bytes(id for id in ids if id < EOD).decode(errors="replace")


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut corpora into parts of 4 KB, and these into blocks of 1 KB."""
    for name in ("sources.PIECE_BYTES", "parts.PIECE_BYTES"):
        monkeypatch.setattr(f"megascratch.data.{name}", 4096)
    monkeypatch.setattr("megascratch.data.corpus.BLOCK_BYTES", 1024)


@pytest.fixture
def quiet():
    """The console of a rank that says nothing."""
    return make_console(rank=1)


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., Path]:
    """Write a dataset of random tokens whose documents end with EOD; return its prefix."""

    def make(name: str, lengths: Sequence[int], seed: int = 0, vocab_size: int = 257) -> Path:
        random = np.random.default_rng(seed)
        prefix = tmp_path / name
        with IndexedDatasetWriter(prefix, token_dtype(vocab_size)) as writer:
            for length in lengths:
                tokens = random.integers(0, min(EOD, vocab_size - 1), length)
                if length:
                    tokens[-1] = min(EOD, vocab_size - 1)
                writer.add_document(tokens, [length])
        return prefix

    return make


@pytest.fixture(scope="session")
def megatron() -> SimpleNamespace:
    """megatron-core's dataset modules; skips where it, or its compiled helper, is missing."""
    pytest.importorskip("megatron.core", reason="megatron-core is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("megatron.core.datasets.helpers_cpp", reason="megatron-core came without its C++ helper")
        from megatron.core.datasets import blended_megatron_dataset_builder as builder
        from megatron.core.datasets import gpt_dataset, helpers, indexed_dataset
    return SimpleNamespace(builder=builder, gpt=gpt_dataset, helpers=helpers, indexed=indexed_dataset)
