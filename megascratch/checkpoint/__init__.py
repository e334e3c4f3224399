"""Checkpoints: logical names and full shapes on disk, layout nowhere, so any layout loads what any layout saved."""

from megascratch.checkpoint.convert import convert
from megascratch.checkpoint.format import OPTIMIZER, Shard
from megascratch.checkpoint.hf import from_hf, to_hf
from megascratch.checkpoint.inspect import Description, describe, verify
from megascratch.checkpoint.load import find, load, read_state
from megascratch.checkpoint.save import save

__all__ = [
    "OPTIMIZER",
    "Description",
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
]
