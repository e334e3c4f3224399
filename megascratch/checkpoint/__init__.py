"""Checkpoints: logical names and full shapes on disk, layout nowhere, so any layout loads what any layout saved."""

from megascratch.checkpoint.convert import convert
from megascratch.checkpoint.format import OPTIMIZER, Shard
from megascratch.checkpoint.inspect import Description, describe, verify
from megascratch.checkpoint.load import Reader, find, load, read_state
from megascratch.checkpoint.places import place, remove_tree
from megascratch.checkpoint.retention import complete_steps, prune, step_of
from megascratch.checkpoint.save import Saving, save, shared_pieces
from megascratch.checkpoint.staging import Staging, aligned
from megascratch.checkpoint.transfer import receive_directory, send_directory
from megascratch.checkpoint.weights import weight_shards

__all__ = [
    "OPTIMIZER",
    "Description",
    "Reader",
    "Saving",
    "Shard",
    "Staging",
    "aligned",
    "complete_steps",
    "convert",
    "describe",
    "find",
    "load",
    "place",
    "prune",
    "read_state",
    "receive_directory",
    "remove_tree",
    "save",
    "send_directory",
    "shared_pieces",
    "step_of",
    "verify",
    "weight_shards",
]
