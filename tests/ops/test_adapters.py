"""Adapters against the recorded signatures of the libraries; against their kernels where they are installed."""

from typing import Any

import pytest
import recorded
import torch
import torch.nn.functional as F

from megascratch import ops
from megascratch.errors import MissingDependency
from megascratch.ops.adapters import PEERS, call, installed

RELEASES = [(library, release) for library, releases in recorded.RECORDED.items() for release in releases]
X, WEIGHT, BIAS = torch.randn(5, 8), torch.randn(8), torch.randn(8)


BODIES: dict[str, recorded.Body] = {
    "fused_rms_norm_affine": lambda a: F.rms_norm(a["input"], a["normalized_shape"], a["weight"], a["eps"]),
    "fused_layer_norm_affine": lambda a: F.layer_norm(
        a["input"], a["normalized_shape"], a["weight"], a["bias"], a["eps"]
    ),
    "apply_rotary_pos_emb": lambda a: _rotate(a),
}


def _rotate(a: dict[str, Any]) -> torch.Tensor:
    assert a["fused"] and a["tensor_format"] == "sbhd" and not a["interleaved"]
    first, second = a["t"].chunk(2, dim=-1)
    return a["t"] * a["freqs"].cos() + torch.cat((-second, first), dim=-1) * a["freqs"].sin()


@pytest.mark.parametrize(("library", "release"), RELEASES)
def test_every_adapter_fits_every_recorded_release(library: str, release: str) -> None:
    angles = torch.rand(6, 4)
    arguments: dict[str, tuple[Any, ...]] = {
        "rms_norm": (X, WEIGHT, 1e-5),
        "layer_norm": (X, WEIGHT, BIAS, 1e-5),
        "rope": (torch.randn(5, 2, 3, 8), torch.randn(5, 2, 1, 8), angles.cos(), angles.sin()),
    }
    with recorded.installed(library, release, BODIES):
        for name, theirs in PEERS[library].items():
            torch.testing.assert_close(theirs(*arguments[name]), getattr(ops, name)(*arguments[name]))


def test_what_only_tunes_is_left_out_and_what_means_something_is_not() -> None:
    def old(x: int, eps: float = 1.0) -> float:
        return x + eps

    def future(x: int, *, mode: str, eps: float = 1.0) -> float:
        return x + eps

    assert call(old, {"fast": True}, x=1, eps=2.0) == 3.0
    with pytest.raises(MissingDependency, match=r"old +has the signature \(x: int, eps: float = 1.0\).*zero_centered"):
        call(old, x=1, zero_centered=True)
    with pytest.raises(MissingDependency, match=r"future.*missing a required .*'mode'"):
        call(future, x=1)
    assert call(lambda **all_of_them: all_of_them, {"fast": True}, x=1) == {"x": 1, "fast": True}


@pytest.mark.parametrize("library", PEERS)
def test_their_kernels_compute_what_ours_do(library: str) -> None:
    if not installed(library):
        pytest.skip(f"{library} is not installed")
    if not torch.cuda.is_available():
        pytest.skip("no GPU that this torch can use")
    with torch.device("cuda"):
        angles = torch.rand(64, 32)
        x, weight, bias = torch.randn(64, 256), torch.randn(256), torch.randn(256)
        arguments: dict[str, tuple[Any, ...]] = {
            "rms_norm": (x, weight, 1e-5),
            "layer_norm": (x, weight, bias, 1e-5),
            "rope": (torch.randn(64, 2, 4, 64), torch.randn(64, 2, 2, 64), angles.cos(), angles.sin()),
        }
    for name, theirs in PEERS[library].items():
        ours = getattr(ops, name)(*arguments[name])
        torch.testing.assert_close(theirs(*arguments[name]), ours, rtol=1e-4, atol=1e-4)
