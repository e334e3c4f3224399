"""Fused operators, in the torch.library namespace `megascratch`.

Each operator's module holds its schema, a plain PyTorch reference, its autograd formula and its fake version; csrc/
holds its C++ and CUDA kernels. The functions check their arguments and call the dispatcher, which picks the kernel.
"""

import torch

from megascratch.ops.activation import OPERATORS as activation_operators
from megascratch.ops.activation import geglu, geglu_tanh, gelu, gelu_tanh, relu_squared, swiglu
from megascratch.ops.adamw import OPERATORS as optimizer_operators
from megascratch.ops.adamw import adamw, adamw_step, squared_norm
from megascratch.ops.attention import OPERATORS as attention_operators
from megascratch.ops.attention import attention, first_keys
from megascratch.ops.backend import Backend, load
from megascratch.ops.cast_transpose import OPERATORS as cast_operators
from megascratch.ops.cast_transpose import cast_transpose
from megascratch.ops.decoding import OPERATORS as decoding_operators
from megascratch.ops.decoding import cached_attention, draw
from megascratch.ops.logits import OPERATORS as logit_operators
from megascratch.ops.logits import logit_gradient, logit_statistics
from megascratch.ops.matmul import OPERATORS as matmul_operators
from megascratch.ops.matmul import matmul, matmul_into
from megascratch.ops.norm import OPERATORS as norm_operators
from megascratch.ops.norm import add_rms_norm, layer_norm, rms_norm
from megascratch.ops.random import OPERATORS as random_operators
from megascratch.ops.random import fill_normal
from megascratch.ops.registry import NAMESPACE, acc_dtype, define
from megascratch.ops.rope import OPERATORS as rope_operators
from megascratch.ops.rope import rope
from megascratch.ops.scaled_softmax import OPERATORS as softmax_operators
from megascratch.ops.scaled_softmax import scaled_softmax

__all__ = [
    "OPERATORS",
    "Backend",
    "acc_dtype",
    "adamw",
    "adamw_step",
    "add_rms_norm",
    "attention",
    "available",
    "backends",
    "cached_attention",
    "cast_transpose",
    "draw",
    "fill_normal",
    "first_keys",
    "geglu",
    "geglu_tanh",
    "gelu",
    "gelu_tanh",
    "layer_norm",
    "logit_gradient",
    "logit_statistics",
    "matmul",
    "matmul_into",
    "relu_squared",
    "rms_norm",
    "rope",
    "scaled_softmax",
    "squared_norm",
    "swiglu",
]

OPERATORS = (
    rope_operators
    + softmax_operators
    + norm_operators
    + activation_operators
    + logit_operators
    + optimizer_operators
    + matmul_operators
    + cast_operators
    + attention_operators
    + decoding_operators
    + random_operators
)

# torch unregisters a namespace when its Library object dies; this one lives as long as the process.
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
for _operator in OPERATORS:
    define(_operator, _LIBRARY)
_BACKENDS = (load("cpu"), load("cuda"))


def backends() -> tuple[Backend, ...]:
    """Every compiled library, loaded or not, and why."""
    return _BACKENDS


def available() -> tuple[str, ...]:
    """The names of the compiled libraries whose kernels are registered."""
    return tuple(backend.name for backend in _BACKENDS if backend.loaded)
