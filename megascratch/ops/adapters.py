"""Other libraries' kernels behind the calls of ours: NVIDIA's apex and transformer-engine, where they are installed.

Both are for GPUs, and their signatures change from release to release. So calls are by keyword, checked against the
signature of what is installed: an argument that only tunes is left out where a release does not know it, one that
carries meaning is an error. `tests/ops/recorded_signatures.json` holds the signatures of the releases that this was
written against. (The package `apex` on PyPI is another project; NVIDIA's is installed from its repository.)
"""

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megascratch.errors import MissingDependency, Problem


def call(function: Callable[..., Any], tuning: Mapping[str, Any] | None = None, /, **arguments: Any) -> Any:
    """Call a function of another library by keyword.

    Args:
        function: theirs.
        tuning: arguments that change nothing but speed or memory; those that it does not take are left out.
        arguments: arguments with a meaning.

    Raises: MissingDependency: if it does not take an argument with a meaning, or asks for one that is not given.
    """
    signature = _signature(function)
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    known = {key: value for key, value in (tuning or {}).items() if takes_all or key in signature.parameters}
    try:
        signature.bind(**arguments, **known)
    except TypeError as error:
        name = getattr(function, "__qualname__", str(function))
        rule = f"has the signature {signature} in the release that is installed: {error}"
        raise MissingDependency(Problem(name, rule, "install a release that this was written against")) from None
    return function(**arguments, **known)


_signature = cache(inspect.signature)  # a product is called thousands of times a step


def apex_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`ops.rms_norm` by apex: x [..., h], weight [h] → [..., h]."""
    norms = importlib.import_module("apex.normalization.fused_layer_norm")
    tuning = {"memory_efficient": False}
    return call(
        norms.fused_rms_norm_affine, tuning, input=x, weight=weight, normalized_shape=tuple(weight.shape), eps=eps
    )


def apex_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`ops.layer_norm` by apex: x [..., h], weight, bias [h] → [..., h]."""
    norms = importlib.import_module("apex.normalization.fused_layer_norm")
    return call(
        norms.fused_layer_norm_affine,
        {"memory_efficient": False},
        input=x,
        weight=weight,
        bias=bias,
        normalized_shape=tuple(weight.shape),
        eps=eps,
    )


def engine_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`ops.rope` by transformer-engine: q [s, b, n, d], k [s, b, k, d], cos and sin [s_max, d/2] → q, k rotated."""
    rope = importlib.import_module("transformer_engine.pytorch.attention.rope")
    angles = torch.atan2(sin, cos)[: len(q)].float()
    freqs = torch.cat((angles, angles), dim=-1)[:, None, None, :]
    rotated = [call(rope.apply_rotary_pos_emb, {"fused": True}, t=x, freqs=freqs, tensor_format="sbhd") for x in (q, k)]
    return rotated[0], rotated[1]


# library → our operator's name → theirs
PEERS: dict[str, dict[str, Callable[..., Any]]] = {
    "apex": {"rms_norm": apex_rms_norm, "layer_norm": apex_layer_norm},
    "transformer_engine": {"rope": engine_rope},
}


def installed(library: str) -> bool:
    """Whether a library of `PEERS` is there; of apex, NVIDIA's."""
    probe = {"apex": "apex.normalization", "transformer_engine": "transformer_engine.pytorch"}[library]
    try:
        return importlib.util.find_spec(probe) is not None
    except ModuleNotFoundError:
        return False
