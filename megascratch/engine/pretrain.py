"""Pretraining: the next token of samples cut from indexed datasets."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from megascratch.config import Config
from megascratch.data.blend import Datasets, build_datasets
from megascratch.data.microbatch import Microbatch
from megascratch.data.sampler import Batches
from megascratch.data.samples import EodRules
from megascratch.dist.launch import Environment
from megascratch.dist.mesh import Mesh
from megascratch.engine.objective import Loss, Objective, Outputs, next_token
from megascratch.engine.task import Begin, Task, Validation, valid_loss
from megascratch.engine.totals import Totals
from megascratch.engine.train import train
from megascratch.errors import DataError, Problem
from megascratch.tokenizer import Tokenizer, formats


def pretraining(config: Config, mesh: Mesh) -> Begin:
    """Open the datasets that a recipe names.

    Raises: DataError: if one is missing, damaged, too small, or holds ids outside the vocabulary.
    """
    tokenizer = formats.open_tokenizer(Path(config.data.tokenizer)) if config.data.tokenizer else None
    datasets = open_datasets(config, tokenizer)
    train, valid = (_batches(datasets, part, config, mesh) for part in ("train", "valid"))
    assert train is not None
    train.require(config.train.samples_of(config.train.steps))
    validation = None
    if valid is not None:
        objective: Objective = next_token
        if tokenizer is not None:
            objective = counting_bytes(token_lengths(tokenizer, config.model.vocab_size or 0), mesh.device)
        validation = Validation(valid, config.eval.batches, objective, _describe)
    digest = data_digest(config)
    task = Task(
        next_token,
        train,
        validation,
        state=lambda: {"data": digest},
        restore=partial(_require_same_data, config, digest),
    )
    return lambda engine: task


def pretrain(config: Config, environment: Environment | None) -> int:
    """Pretrain this rank's part of a model. Arguments, result and errors as of `train`."""
    return train(config, environment, pretraining)


def data_digest(config: Config) -> str:
    """Return a digest of what decides which samples a run reads: indexes, lengths of data, and the recipe's cuts."""
    data = config.data
    digest = xxhash.xxh3_64(json.dumps([data.weights, data.split, data.seq_length, config.train.seed]).encode())
    for path in data.paths:
        digest.update(Path(f"{path}.idx").read_bytes())
        digest.update(f"{Path(f'{path}.bin').stat().st_size}".encode())
    return digest.hexdigest()


def _require_same_data(config: Config, digest: str, state: Mapping[str, Any]) -> None:
    """See that a run goes on with the data that it began with; one that begins from another's weights may not."""
    if config.checkpoint.load is None and state.get("data", digest) != digest:
        rule = "or the keys that cut them into samples are not those that this run was trained on so far"
        remedy = "restore them, or begin a run of its own with checkpoint.load and another log.dir"
        raise DataError(Problem(f"data.paths = {config.data.paths}", rule, remedy))


def open_datasets(config: Config, tokenizer: Tokenizer | None) -> Datasets:
    """Open the datasets that a recipe names, cut into as many samples as the run reads.

    Raises: DataError: if one is missing, damaged, too small, or holds ids outside the vocabulary.
    """
    data, train = config.data, config.train
    shares = [float(share) for share in data.split.split(",")]
    n_valid = config.eval.batches * train.global_batch if any(shares[1:2]) else 0
    return build_datasets(
        data.paths,
        data.weights,
        data.split,
        data.seq_length,
        train.seed,
        (train.samples_of(train.steps), n_valid, 0),
        data.cache_dir,
        rules=EodRules(
            tokenizer.eod_id if tokenizer is not None else None, data.eod_mask_loss, data.reset_position_ids
        ),
        vocab_size=config.model.vocab_size,
    )


def counting_bytes(token_bytes: np.ndarray, device: torch.device) -> Objective:
    """Return `next_token` with the bytes of text that the predicted tokens stand for as a metric.

    Args:
        token_bytes: of each id, [v].
        device: where the objective is computed.
    """
    lengths = torch.from_numpy(token_bytes).double().to(device)

    def objective(outputs: Outputs, microbatch: Microbatch) -> Loss:
        loss = next_token(outputs, microbatch)
        return replace(
            loss, metrics={**loss.metrics, "bytes": (lengths[microbatch.labels] * microbatch.loss_mask).sum()}
        )

    return objective


def token_lengths(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """Return how many bytes each id of the model's vocabulary stands for, [vocab_size] float32; unused ids: none."""
    lengths = np.zeros(vocab_size, dtype=np.float32)
    lengths[: tokenizer.vocab_size] = tokenizer.byte_lengths()
    return lengths


def _describe(totals: Totals) -> dict[str, float]:
    """Name the loss in nats a token and, where bytes are known, in bits a byte."""
    bytes_a_token = totals.metrics.get("bytes", 0.0)
    values = valid_loss(replace(totals, metrics={k: v for k, v in totals.metrics.items() if k != "bytes"}))
    if bytes_a_token:
        values["valid_bits_per_byte"] = totals.loss / math.log(2) / bytes_a_token
    return values


def _batches(datasets: Datasets, part: str, config: Config, mesh: Mesh) -> Batches | None:
    dataset = getattr(datasets, part)
    if dataset is None:
        return None
    return Batches.of(config, dataset, mesh.dp, grows=part == "train")
