"""The decoder's layers, each its own serial self on a tensor-parallel axis of size 1."""

from megascratch.nn.activations import NOTHING, WHOLE, Activations, Recompute
from megascratch.nn.adapters import Adapter, add_adapters, is_addition, is_target, require_adapters
from megascratch.nn.attention import LayerCache, core_for
from megascratch.nn.fp8 import Recipe
from megascratch.nn.loss import linear_cross_entropy, linear_logprobs, token_logprobs
from megascratch.nn.nf4 import PackedWeight, packed_weights
from megascratch.nn.placement import DTYPES, Placement
from megascratch.nn.sequence import SequenceInfo
from megascratch.nn.transformer import Block, Stage, layer_range, parameter_specs, scores
from megascratch.nn.transformer_engine import recipe_of
from megascratch.nn.weight_gradients import WeightGradients

__all__ = [
    "DTYPES",
    "NOTHING",
    "WHOLE",
    "Activations",
    "Adapter",
    "Block",
    "LayerCache",
    "PackedWeight",
    "Placement",
    "Recipe",
    "Recompute",
    "SequenceInfo",
    "Stage",
    "WeightGradients",
    "add_adapters",
    "core_for",
    "is_addition",
    "is_target",
    "layer_range",
    "linear_cross_entropy",
    "linear_logprobs",
    "packed_weights",
    "parameter_specs",
    "recipe_of",
    "require_adapters",
    "scores",
    "token_logprobs",
]
