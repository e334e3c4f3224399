"""Checkpoints: logical names and full shapes on disk, layout nowhere, so any layout loads what any layout saved."""

from megascratch.checkpoint.convert import convert
from megascratch.checkpoint.format import OPTIMIZER, Shard
from megascratch.checkpoint.hf import from_hf, to_hf
from megascratch.checkpoint.inspect import Description, describe, verify
from megascratch.checkpoint.load import Reader, find, load, read_state
from megascratch.checkpoint.save import save
from megascratch.checkpoint.weights import weight_shards

__all__ = [
    "OPTIMIZER",
    "Description",
    "Reader",
    "Shard",
    "convert",
    "describe",
    "find",
    "from_hf",
    "load",
    "read_state",
    "save",
    "to_hf",
    "verify",
    "weight_shards",
]
