"""Evaluation against a computation by hand over the same windows."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from saved_models import TEXTS, save_model, tokenizer

from megascratch.data.writer import IndexedDatasetWriter
from megascratch.dist.mesh import Mesh
from megascratch.errors import CheckpointError, ConfigError, DataError, TokenizerError
from megascratch.evals import Evaluation, evaluate
from megascratch.infer import load_model
from megascratch.log import make_console
from megascratch.nn import SequenceInfo

QUIET = make_console(1)
EOD = tokenizer().special_tokens["<|endoftext|>"]
DOCUMENTS = [[*tokenizer().encode(text), EOD] for text in (TEXTS[0], "", TEXTS[1], TEXTS[0][:17])]
STREAM = [id for document in DOCUMENTS for id in document]
assert len(STREAM) % 16 not in (0, 1)  # the last window is shorter than the others


def _write(prefix: Path, documents: list[list[int]]) -> Path:
    with IndexedDatasetWriter(prefix, np.dtype("<u2")) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return _write(tmp_path / "text", DOCUMENTS)


def _evaluate(*args: Any, **kwargs: Any) -> Evaluation:
    return evaluate(*args, console=QUIET, **kwargs)


def _token_nats(checkpoint: Path, seq_length: int) -> list[float]:
    """Return the loss of every token but the first, a window at a time."""
    stage, _ = load_model(checkpoint, Mesh.serial())
    nats: list[float] = []
    for start in range(0, len(STREAM) - 1, seq_length):
        window = torch.tensor(STREAM[start : start + seq_length + 1])
        logits = stage(None, window[None, :-1], SequenceInfo(len(window) - 1))[:, 0, : tokenizer().vocab_size]
        nats += (-logits.log_softmax(-1).gather(-1, window[1:, None]))[:, 0].tolist()
    assert len(nats) == len(STREAM) - 1
    return nats


@pytest.mark.parametrize("seq_length", [None, 5, 64])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_the_sum_by_hand(tmp_path: Path, data: Path, seq_length: int | None, micro_batch: int) -> None:
    train = {"dtype": "fp64", "micro_batch": micro_batch, "global_batch": micro_batch}
    checkpoint = save_model(tmp_path / "run", sections={"train": train})
    nats = _token_nats(checkpoint, seq_length or 16)
    result = _evaluate(checkpoint, data, seq_length=seq_length)
    assert result.n_tokens == len(nats)
    assert result.nats == pytest.approx(sum(nats), rel=1e-12)
    assert result.nats_per_token == pytest.approx(sum(nats) / len(nats), rel=1e-12)
    assert result.perplexity == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-12)
    # All text but the first token's; an end of document is no text.
    text = "".join((TEXTS[0], TEXTS[1], TEXTS[0][:17]))
    assert result.n_bytes == len(text.encode()) - len(tokenizer().token_bytes(STREAM[0]))
    assert result.bits_per_byte == pytest.approx(sum(nats) / math.log(2) / result.n_bytes, rel=1e-12)


def test_a_number_of_batches_bounds_the_tokens(tmp_path: Path, data: Path) -> None:
    train = {"dtype": "fp64", "micro_batch": 2, "global_batch": 2}
    checkpoint = save_model(tmp_path / "run", sections={"train": train})
    result = _evaluate(checkpoint, data, batches=1, seq_length=8)
    assert result.n_tokens == 16
    assert result.nats == pytest.approx(sum(_token_nats(checkpoint, 8)[:16]), rel=1e-12)
    assert _evaluate(checkpoint, data, batches=1000) == _evaluate(checkpoint, data)


def test_masked_tokens_do_not_count(tmp_path: Path, data: Path) -> None:
    sections = {"data": {"seq_length": 16, "eod_mask_loss": True}}
    checkpoint = save_model(tmp_path / "run", sections=sections)
    nats = _token_nats(checkpoint, 16)
    kept = [value for value, before in zip(nats, STREAM) if before != EOD]
    result = _evaluate(checkpoint, data)
    assert (result.n_tokens, result.nats) == (len(kept), pytest.approx(sum(kept), rel=1e-12))
    labels = [id for id, before in zip(STREAM[1:], STREAM) if before != EOD]
    assert result.n_bytes == len(tokenizer().decode_bytes([id for id in labels if id != EOD]))


def test_positions_restart_with_documents_where_they_did_in_training(tmp_path: Path, data: Path) -> None:
    plain = save_model(tmp_path / "plain", position="learned")
    sections = {"data": {"seq_length": 16, "reset_position_ids": True}}
    restarting = save_model(tmp_path / "restarting", position="learned", sections=sections)
    # In windows of one token every position is 0 either way; in longer ones they differ.
    assert _evaluate(restarting, data, seq_length=1) == _evaluate(plain, data, seq_length=1)
    assert _evaluate(restarting, data) != _evaluate(plain, data)


def test_without_a_tokenizer_bytes_are_unknown(tmp_path: Path, data: Path) -> None:
    checkpoint = save_model(tmp_path / "run")
    with_bytes = _evaluate(checkpoint, data)
    file = (tmp_path / "run" / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    without = _evaluate(checkpoint, data)
    assert (without.nats, without.n_bytes, without.bits_per_byte) == (with_bytes.nats, None, None)
    assert _evaluate(checkpoint, data, tokenizer=file) == with_bytes
    with pytest.raises(TokenizerError, match="nowhere"):
        _evaluate(checkpoint, data, tokenizer=tmp_path / "nowhere.json")


def test_wrong_requests_are_refused(tmp_path: Path, data: Path) -> None:
    checkpoint = save_model(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"seq_length = 65 +must be 1 to model.max_seq_length = 64"):
        _evaluate(checkpoint, data, seq_length=65)
    with pytest.raises(ConfigError, match=r"batches = 0 +must be 1 or more"):
        _evaluate(checkpoint, data, batches=0)
    with pytest.raises(CheckpointError, match="does not exist"):
        _evaluate(tmp_path / "nowhere", data)
    with pytest.raises(DataError, match=r"nothing\.bin +no such file"):
        _evaluate(checkpoint, tmp_path / "nothing")
    with pytest.raises(DataError, match=r"token id 300 .* must be 0 to 299"):
        _evaluate(checkpoint, _write(tmp_path / "foreign", [[1, 2, 300, 4]]))
    with pytest.raises(DataError, match=r"1 tokens +one predicts the next"):
        _evaluate(checkpoint, _write(tmp_path / "short", [[1]]))
