"""A run small enough for hundreds of them: a corpus that counts upwards, and a model of two layers that learns it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megascratch.config import Config, config_from_dict
from megascratch.data.writer import IndexedDatasetWriter
from megascratch.dist.mesh import Mesh
from megascratch.engine import pretraining, train_on

VOCAB_SIZE = 64


def write_corpus(folder: Path) -> Path:
    """Write documents that count upwards, and return the dataset's prefix."""
    prefix = folder / "counting"
    with IndexedDatasetWriter(prefix, np.dtype(np.uint16)) as writer:
        for start in range(200):
            tokens = (start + np.arange(40)) % VOCAB_SIZE
            writer.add_document(tokens, [len(tokens)])
    return prefix


def run_config(corpus: Path, folder: Path, **sections: dict[str, Any]) -> Config:
    """Return the recipe of a run in `folder/run`; sections replace its keys."""
    raw: dict[str, dict[str, Any]] = {
        "model": {"n_layers": 2, "hidden": 32, "n_heads": 4, "ffn_hidden": 64, "vocab_size": VOCAB_SIZE},
        "data": {"paths": [str(corpus)], "seq_length": 16, "split": "90,10,0"},
        "train": {"steps": 6, "global_batch": 4, "dtype": "fp32"},
        "optim": {"lr": 0.01},
        "eval": {"batches": 2},
        "log": {"dir": str(folder / "run"), "tensorboard": False},
    }
    for section, keys in sections.items():
        raw.setdefault(section, {}).update(keys)
    return config_from_dict(raw)


def records(config: Config) -> list[dict[str, Any]]:
    """Return what a run has logged."""
    return [json.loads(line) for line in (Path(config.log.dir) / "metrics.jsonl").read_text().splitlines()]


def losses(config: Config) -> dict[int, float]:
    """Return the loss of each step; of one that was trained twice, the later."""
    return {record["step"]: record["loss"] for record in records(config)}


def files_of(config: Config, step: int) -> dict[str, bytes]:
    """Return the pieces of a checkpoint: what was trained, without what the recipe says about saving."""
    assert config.checkpoint.dir is not None
    return {
        file.name: file.read_bytes() for file in Path(config.checkpoint.dir, f"step_{step:08d}").glob("*.safetensors")
    }


def saving_config(corpus: Path, folder: Path, number: int, steps: int, dp: int) -> Config:
    """Return the recipe of one of many runs that save after every step, to be killed: in float64.

    By their number they save in turn and asynchronously, into new files and over old ones.
    """
    return run_config(
        corpus,
        folder,
        parallel={"dp": dp},
        train={"dtype": "fp64", "steps": steps},
        checkpoint={"every": 1, "keep": 2, "asynchronous": number % 2 == 1, "recycle": number % 4 > 1},
        eval={"batches": 1},
        data={"split": "100,0,0"},
    )


def difference_of_bits(config: Config, straight: Config, step: int) -> str:
    """Return what a run that was killed has got else than the one that was left alone: nothing, if all is well."""
    if losses(config) != losses(straight):
        return f"losses: {losses(config)}"
    return "" if files_of(config, step) == files_of(straight, step) else "the last checkpoint's bits"


def pretrain_on_ranks(config: Config) -> int:
    """Train on the ranks of a test's process group."""
    return train_on(config, Mesh.of(config, torch.device("cpu")), pretraining)
