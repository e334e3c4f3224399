"""Checkpoints of small random models with their tokenizers, for tests that read them back."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from logical import fill

from megascratch.checkpoint import Shard, save
from megascratch.config import Config, config_from_dict
from megascratch.dist.layout import extents, spec_of
from megascratch.dist.mesh import Mesh
from megascratch.nn import Placement, Stage
from megascratch.tokenizer import Tokenizer, train_from_texts

TEXTS = [
    "def read_lines(path):\n    with open(path) as file:\n        return [line.rstrip() for line in file]\n",
    "Zwölf große Boxkämpfer jagen Viktor quer über den Sylter Deich. 🥊🥊 日本語のテキスト\n",
]

SHAPE: dict[str, Any] = {
    "n_layers": 2,
    "hidden": 32,
    "n_heads": 4,
    "n_kv_heads": 2,
    "ffn_hidden": 48,
    "max_seq_length": 64,
}


@cache
def tokenizer() -> Tokenizer:
    return train_from_texts(TEXTS, vocab_size=300)


def save_model(folder: Path, seed: int = 7, dtype: str = "fp64", sections: Any = None, **changes: Any) -> Path:
    """Write a run directory with a checkpoint of one random model, and return the checkpoints' directory."""
    model = {**SHAPE, "vocab_size": tokenizer().vocab_size, **changes}
    raw = {"model": model, "train": {"dtype": dtype}, "data": {"seq_length": 16}, "log": {"dir": str(folder)}}
    config = config_from_dict({**raw, **(sections or {})})
    save_stage(folder / "checkpoints", config, seed)
    tokenizer().save(folder / "tokenizer.json")
    return folder / "checkpoints"


def save_stage(root: Path, config: Config, seed: int) -> None:
    mesh = Mesh.serial()
    dtype = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}[config.train.dtype]
    stage = Stage(config.model, Placement(mesh.tp, False, dtype, mesh.device))
    fill(stage, mesh, seed)
    specs = [(spec_of(param), param) for param in stage.parameters()]
    shards = [Shard(s.name, s.shape, param, extents(s, mesh.spec.sizes, mesh.coords)) for s, param in specs]
    save(root, 1, shards, {"config": config.model_dump(mode="json")}, mesh.world)
