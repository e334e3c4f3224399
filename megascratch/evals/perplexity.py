"""Loss of a checkpoint on an indexed dataset: nats a token, perplexity, bits a byte.

The dataset's documents follow each other as in training, cut into windows that share one token, so that every token
but the first is predicted exactly once:

    tokens       a b c d e f g h        seq_length 3
    window 0     a b c → b c d
    window 1           d e f → e f g
    window 2                 g → h      the last one is what is left

Nats a token depend on the tokenizer: longer tokens are fewer and harder. Bits a byte do not, being the whole loss in
bits over the bytes of the text that was predicted; an end-of-document token stands for no byte, but its loss counts.

Legend: `b` windows a batch, `s` tokens a window.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from megascratch.config import Config
from megascratch.data.indexed import IndexedDataset
from megascratch.data.samples import EodRules, loss_mask, position_ids
from megascratch.data.token_ids import check_token_ids, outside_vocabulary
from megascratch.dist.launch import Environment
from megascratch.dist.mesh import Mesh
from megascratch.errors import ConfigError, DataError, Problem, TokenizerError
from megascratch.infer import load_model, open_tokenizer, read_config
from megascratch.log import make_console, progress
from megascratch.nn import SequenceInfo, Stage, token_logprobs
from megascratch.tokenizer import Tokenizer

Tokens = NDArray[np.int64]


@dataclass(frozen=True)
class Evaluation:
    """What the model made of the text.

    Attributes:
        nats: loss summed over the predicted tokens.
        n_tokens: tokens predicted.
        n_bytes: bytes of text that they stand for; None when there is no tokenizer to say.
    """

    nats: float
    n_tokens: int
    n_bytes: int | None

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.n_tokens

    @property
    def perplexity(self) -> float:
        """e to the nats a token: among how many equally likely tokens the model hesitates."""
        return math.exp(self.nats_per_token)

    @property
    def bits_per_byte(self) -> float | None:
        """None where the bytes are not known, or there are none."""
        return self.nats / math.log(2) / self.n_bytes if self.n_bytes else None


def evaluate(
    checkpoint: Path,
    data_prefix: Path | str,
    *,
    seq_length: int | None = None,
    batches: int | None = None,
    tokenizer: Path | None = None,
    console: Console | None = None,
) -> Evaluation:
    """Measure a checkpoint on a dataset, in this process.

    Args:
        checkpoint: a checkpoint, or a directory with `latest`.
        data_prefix: of an indexed dataset, tokenized as the model's training data was.
        seq_length: tokens a window; that of training when left out.
        batches: of `train.micro_batch` windows to read at most; the whole dataset when left out.
        tokenizer: the checkpoint's own when left out, or none, if there is none: then bytes are not counted.
        console: for progress.

    Raises: UserError: before anything is computed, if checkpoint, dataset or tokenizer are unusable or do not fit.
    """
    mesh = Mesh.serial(Environment(rank=0, world_size=1, local_rank=0, local_world_size=1).device)
    config = read_config(checkpoint)
    seq_length = _checked_length(config, seq_length, batches)
    dataset = IndexedDataset(data_prefix)
    check_token_ids(dataset, config.model.vocab_size)
    if dataset.n_tokens < 2:
        raise DataError(Problem(f"{dataset.n_tokens} tokens", "one predicts the next: 2 or more", "give more text"))
    opened = _tokenizer(checkpoint, config, tokenizer)
    rules = EodRules(opened.eod_id if opened else None, config.data.eod_mask_loss, config.data.reset_position_ids)
    stage, _ = load_model(checkpoint, mesh)
    limit = dataset.n_tokens if batches is None else batches * config.train.micro_batch * seq_length
    scores = _Scores(stage, rules, None if opened is None else opened.byte_lengths())
    n_tokens = min(dataset.n_tokens - 1, limit)
    with progress(console or make_console(), f"evaluating {checkpoint}", n_tokens, "tokens") as advance:
        for windows in _batches(dataset, seq_length, config.train.micro_batch, n_tokens, scores.vocab_size):
            scores.add(windows)
            advance(windows[:, 1:].size)
    if scores.n_tokens == 0:
        raise DataError(Problem("every token", "is masked by data.eod_mask_loss", "give text"), str(dataset.prefix))
    return Evaluation(scores.nats, scores.n_tokens, None if opened is None else scores.n_bytes)


class _Scores:
    """Sums over the windows that were read, and the model that scores them."""

    def __init__(self, stage: Stage, rules: EodRules, byte_lengths: NDArray[np.int32] | None) -> None:
        assert stage.model.vocab_size is not None
        self.stage, self.rules = stage, rules
        self.vocab_size = stage.model.vocab_size
        self.nats, self.n_tokens, self.n_bytes = 0.0, 0, 0
        # Ids that the model has and the tokenizer does not spell no bytes.
        self.byte_lengths = np.zeros(self.vocab_size, np.int64)
        if byte_lengths is not None:
            known = byte_lengths[: self.vocab_size]
            self.byte_lengths[: len(known)] = known

    @torch.no_grad()
    def add(self, windows: Tokens) -> None:
        """Score windows [b, s + 1]."""
        inputs, labels = windows[:, :-1], windows[:, 1:]
        counts = np.stack([loss_mask(row, self.rules) for row in inputs]) > 0
        positions = np.stack([position_ids(row, self.rules) for row in inputs])
        device = self.stage.placement.device
        info = SequenceInfo(inputs.shape[1], positions=torch.from_numpy(positions).to(device))
        logits = self.stage(None, torch.from_numpy(inputs).to(device), info)
        wanted = torch.from_numpy(labels).to(device).t()
        logprobs = token_logprobs(logits, wanted, self.vocab_size, self.stage.placement.tp).t()
        self.nats -= float(logprobs.double().cpu().numpy()[counts].sum())
        self.n_tokens += int(counts.sum())
        self.n_bytes += int(self.byte_lengths[labels[counts]].sum())


def _checked_length(config: Config, seq_length: int | None, batches: int | None) -> int:
    """Return the length of a window, after checking it and the number of batches."""
    length = config.data.seq_length if seq_length is None else seq_length
    longest = config.model.max_seq_length
    problems = []
    if not 1 <= length <= longest:
        problems.append(Problem(f"seq_length = {length}", f"must be 1 to model.max_seq_length = {longest}"))
    if batches is not None and batches < 1:
        problems.append(Problem(f"batches = {batches}", "must be 1 or more", "leave it out for the whole dataset"))
    if problems:
        raise ConfigError(problems, "the evaluation's options")
    return length


def _tokenizer(checkpoint: Path, config: Config, given: Path | None) -> Tokenizer | None:
    try:
        return open_tokenizer(checkpoint, config, given)
    except TokenizerError:
        if given is not None:
            raise
        return None


def _batches(dataset: IndexedDataset, seq_length: int, batch: int, n_tokens: int, vocab_size: int) -> Iterator[Tokens]:
    """Yield windows [b, s + 1] that predict the first `n_tokens` tokens after the very first, each once.

    Raises: DataError: at an id outside the vocabulary; a large dataset was only sampled for them beforehand.
    """
    windows: list[Tokens] = []
    for window in _windows(dataset, seq_length, n_tokens):
        if (wrong := outside_vocabulary(window, vocab_size)) is not None:
            rule = f"must be 0 to {vocab_size - 1}, as model.vocab_size = {vocab_size}"
            raise DataError(Problem(f"token id {window[wrong]}", rule), str(dataset.bin_path))
        if windows and (len(windows) == batch or len(window) != len(windows[0])):
            yield np.stack(windows)
            windows = []
        windows.append(window)
    yield np.stack(windows)


def _windows(dataset: IndexedDataset, seq_length: int, n_tokens: int) -> Iterator[Tokens]:
    """Yield windows [s + 1], the last one shorter; neighbours share one token."""
    left = np.empty(0, np.int64)
    n_left = n_tokens + 1
    for block in dataset.token_blocks(1 << 20):
        left = np.concatenate([left, block[: max(0, n_left)].astype(np.int64)])
        n_left -= len(block)
        first = 0
        while len(left) - first > seq_length:
            yield left[first : first + seq_length + 1]
            first += seq_length
        left = left[first:]
        if n_left <= 0:
            break
    if len(left) > 1:
        yield left
