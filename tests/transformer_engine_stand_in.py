"""transformer-engine as our linear layers call it, with the recorded signatures, on the CPU.

A quantised matrix is here what it stands for, once as it is multiplied along its rows and once along its columns, in
the dtype of what was quantised: rounding is the recipe's, products are torch's. `exact` leaves the rounding out.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from types import ModuleType
from typing import Any

import recorded
import torch
from torch import Tensor

Modules = dict[str, ModuleType]
PYTORCH, GEMM = "transformer_engine.pytorch", "transformer_engine.pytorch.cpp_extensions"


class DType(Enum):
    kFloat8E4M3 = torch.float8_e4m3fn
    kFloat8E5M2 = torch.float8_e5m2


def rounded(x: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
    """What x stands for once x · scale is rounded to fp8; what is too large becomes the largest number."""
    largest = torch.finfo(dtype).max
    return ((x.float() * scale).clamp(-largest, largest).to(dtype).float() / scale).to(x.dtype)


def in_blocks(x: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Round x [r, c], each block of rows × columns scaled by a power of two of its own."""
    blocks = x.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    peak = blocks.float().abs().amax((1, 3), keepdim=True).clamp_min(2.0**-100)
    scale = torch.exp2((torch.finfo(dtype).max / peak).log2().floor())
    return rounded(blocks, scale, dtype).reshape(x.shape)


class Matrix:
    """What a quantiser makes."""

    def __init__(self, rows: Tensor | None, columns: Tensor | None) -> None:
        self.rows, self.columns = rows, columns

    def update_usage(self, rowwise_usage: bool, columnwise_usage: bool) -> None:
        self.rows = self.rows if rowwise_usage else None
        self.columns = self.columns if columnwise_usage else None


class Quantizer:
    """Rounds as one of theirs does, by its recorded arguments."""

    internal = False

    def __init__(self, kind: str, exact: bool, arguments: dict[str, Any]) -> None:
        self.kind, self.exact, self.arguments = kind, exact, arguments
        self.dtype = arguments["fp8_dtype"].value
        self.scale, self.amax = arguments.get("scale"), arguments.get("amax")
        assert arguments["rowwise"] and arguments["columnwise"]

    def __call__(self, x: Tensor) -> Matrix:
        assert self.internal and x.ndim == 2 and x.is_contiguous() and not x.requires_grad
        if self.amax is not None:
            self.amax.copy_(torch.maximum(self.amax, x.abs().amax()))
        if self.exact:
            return Matrix(x.clone(), x.clone())
        if self.kind == "Float8Quantizer":
            made = rounded(x, self.scale, self.dtype)
            return Matrix(made, made)
        if self.kind == "MXFP8Quantizer":
            return Matrix(in_blocks(x, 1, 32, self.dtype), in_blocks(x, 32, 1, self.dtype))
        n = 128 if self.arguments["block_scaling_dim"] == 2 else 1
        return Matrix(in_blocks(x, n, 128, self.dtype), in_blocks(x, 128, n, self.dtype))


def general_gemm(a: dict[str, Any]) -> tuple[Tensor, None, None, None]:
    """cuBLAS's order: TN makes B Aᵀ, NN makes B A, NT makes Bᵀ A; T reads A along rows, and B along columns."""
    first, second = a["layout"]
    left = a["B"].columns.t() if second == "T" else a["B"].rows
    right = a["A"].rows.t() if first == "T" else a["A"].columns
    made = (left.to(right.dtype) @ right).to(a["out_dtype"])
    if a["out"] is None:
        return made, None, None, None
    assert a["accumulate"] and a["out"].is_contiguous() and a["out"].dtype == a["out_dtype"]
    return a["out"].add_(made), None, None, None


def prepare_for_saving(a: dict[str, Any]) -> tuple[list[Tensor | None], list[Matrix]]:
    (matrix,) = a["tensors"]
    kept = [matrix.rows, matrix.columns]
    matrix.rows = matrix.columns = None
    return kept, [matrix]


def restore_from_saved(a: dict[str, Any]) -> list[Matrix]:
    (matrix,) = a["tensors"]
    kept: Sequence[Tensor | None] = a["saved_tensors"]
    matrix.rows, matrix.columns = kept
    return [matrix]


@contextmanager
def transformer_engine(release: str = "2.18", exact: bool = False, refused: str = "") -> Iterator[Modules]:
    """Have transformer-engine; `refused` is its reason for not supporting this device."""
    kinds = ("Float8Quantizer", "Float8BlockQuantizer", "MXFP8Quantizer")
    questions = ("is_fp8_available", "is_mxfp8_available", "is_fp8_block_scaling_available")
    bodies: dict[str, recorded.Body] = {kind: lambda a, kind=kind: Quantizer(kind, exact, a) for kind in kinds}
    bodies |= {question: lambda a: (not refused, refused) for question in questions}
    bodies |= {f.__name__: f for f in (general_gemm, prepare_for_saving, restore_from_saved)}
    extension = ModuleType("transformer_engine_torch")
    extension.DType = DType  # type: ignore[attr-defined]
    with recorded.installed("transformer_engine", release, bodies, {"transformer_engine_torch": extension}) as modules:
        yield modules
