"""Linear layers whose three products run in fp8 (`train.dtype = "fp8"`): weights, bucket gradients and all else stay.

Legend: `m` tokens, `h` input features, `f` output features; hats are fp8 numbers, α their scales.

A tensor is multiplied by α, so that the format's range is used, then rounded; products accumulate in float32:

    Y  = X̂ Ŵᵀ  / (α_X α_W)       [m, h] · [h, f]     multiplied along h
    dX = Ĝ Ŵ   / (α_G α_W)       [m, f] · [f, h]     along f: needs Ŵᵀ
    dW = Ĝᵀ X̂  / (α_G α_X)       [f, m] · [m, h]     along m: needs Ĝᵀ and X̂ᵀ

What has an α of its own, and where it comes from, is the recipe (`train.fp8_recipe`). Tensorwise current scaling is
here: each tensor, with α = largest number of the format / its own largest magnitude, so that nothing overflows.
Activations and weights take e4m3 (three bits of precision), gradients e5m2 (range). The other recipes are
transformer-engine's (`transformer_engine.py`).

By hand: X = [0.5, 2.0] has α = 448 / 2 = 224; X̂ = [112, 448], both exact. X = [0.3, 2.0] gives 67.2, which rounds to
64: read back, 0.2857.

Each rank scales by what it holds, so layouts round differently here, as they do in every 16-bit format.

Activations differ from micro-batch to micro-batch, weights do not: while none changes (`Recipe.weights_stay`), each is
quantised at its first use, in both orders, and every later forward, backward and recomputation takes what was made
then. By hand, a layer in a step of 3 micro-batches, in the order of 1F1B on the first of two ranks:

    F0 F1 B0 F2 B1 B2      X̂ in every F, Ĝ in every B: 3 of each
    Ŵ . . .  . .  .        Ŵ in F0 alone, for 6

Source: Micikevicius et al. 2022, arXiv:2209.05433.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from megascratch import ops
from megascratch.dist import comm
from megascratch.dist.layout import ParamSpec
from megascratch.dist.mesh import Axis
from megascratch.errors import ConfigError, Problem
from megascratch.nn.weight_gradients import WeightGradients, main_grad, weight_gradient

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
SMALLEST = 2.0**-100  # a tensor of zeros gets a finite scale, with a finite reciprocal

Role = Literal["input", "weight", "gradient"]
"""What a matrix is to its layer: X, W or G."""
DTYPE_OF: dict[Role, torch.dtype] = {"input": FORWARD, "weight": FORWARD, "gradient": BACKWARD}
Restore = Callable[[Sequence[Tensor]], Any]
"""Puts a quantised matrix together again from the tensors that were kept of it."""


class Recipe:
    """How matrices become 8 bits, and how those are multiplied. A quantised one is any object of the recipe's own."""

    _of_weights: dict[Tensor, Any] | None = None  # what was made of them; None where they may change

    @contextmanager
    def weights_stay(self) -> Iterator[None]:
        """No weight changes meanwhile, so each is quantised once. At the end all that was made of them is let go."""
        assert self._of_weights is None, "one pass at a time"
        self._of_weights = {}
        try:
            yield
        finally:
            self._of_weights = None

    def quantized_weight(self, weight: Tensor) -> Any:
        """Return W [f, h] quantised: at its first use while weights stay, else at every one."""
        if self._of_weights is None:
            return self.quantize(weight, "weight", weight)
        if weight not in self._of_weights:
            self._of_weights[weight] = self.quantize(weight, "weight", weight)
        return self._of_weights[weight]

    def release(self, weights: Iterable[Tensor]) -> None:
        """Let go of what was made of weights whose own values are given back until their next use (ZeRO-3)."""
        if self._of_weights is not None:
            for weight in weights:
                self._of_weights.pop(weight, None)

    def quantize(self, x: Tensor, role: Role, weight: Tensor) -> Any:
        """Quantise a matrix [r, c] of the layer that has this weight. One that is not finite makes NaN."""
        raise NotImplementedError

    def output(self, x: Any, weight: Any, dtype: torch.dtype) -> Tensor:
        """Multiply X [m, h] by Wᵀ, W [f, h] → [m, f]."""
        raise NotImplementedError

    def grad_input(self, grad: Any, weight: Any, dtype: torch.dtype) -> Tensor:
        """Multiply G [m, f] by W [f, h] → [m, h]."""
        raise NotImplementedError

    def grad_weight(self, grad: Any, x: Any, dtype: torch.dtype, total: Tensor | None) -> Tensor | None:
        """Multiply Gᵀ, G [m, f], by X [m, h] → [f, h]; with a total [f, h] add to it instead, and return None."""
        raise NotImplementedError

    def keep(self, x: Any) -> tuple[Sequence[Tensor | None], Restore]:
        """Return what a backward pass needs of X, which is not used again before, and how to put it together."""
        raise NotImplementedError

    def attach(self, weights: Iterable[Tensor]) -> None:
        """Be told of all weights of this rank's layers, before the first product."""

    def begin_step(self) -> None:
        """A training step is about to run."""

    def end_step(self) -> None:
        """Its gradients are there. Every rank calls this."""

    def state(self) -> list[tuple[ParamSpec, Tensor]]:
        """Return what the next step depends on, for each weight, the same on all ranks that hold a part of it."""
        return []

    def refresh(self) -> None:
        """Take note of a state that was loaded."""


class Quantized:
    """A matrix in fp8, times `unit` what it stands for.

    Args:
        rows: [r, c], contiguous.
        unit: one float32 number, 1 / α.
        columns: its transpose, [c, r], contiguous; made at its first use when left out.
    """

    def __init__(self, rows: Tensor, unit: Tensor, columns: Tensor | None = None) -> None:
        self.rows, self.unit, self._columns = rows, unit, columns

    @property
    def columns(self) -> Tensor:
        """The transpose, [c, r], contiguous."""
        if self._columns is None:
            self._columns = self.rows.view(torch.uint8).t().contiguous().view(self.rows.dtype)
        return self._columns


def scale_and_unit(magnitude: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return α for numbers up to a magnitude, and 1 / α, float32."""
    largest, magnitude = torch.finfo(dtype).max, magnitude.float().clamp_min(SMALLEST)
    return largest / magnitude, magnitude / largest


def gathered_codes(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return a weight's rows [f, h] in fp8 and their unit, where ranks gather those in place of its values, or None."""
    find: Callable[[], tuple[Tensor, Tensor]] | None = getattr(weight, "codes", None)
    return None if find is None else find()


def quantize(x: Tensor, dtype: torch.dtype) -> Quantized:
    """Quantise a matrix [r, c] by its own largest magnitude. One that is not finite makes NaN, which training skips."""
    scale, unit = scale_and_unit(torch.linalg.vector_norm(x, ord=torch.inf), dtype)
    rows, columns = ops.cast_transpose(x, scale, dtype)
    return Quantized(rows, unit, columns)


def product(a: Tensor, b: Tensor, unit_a: Tensor, unit_b: Tensor, dtype: torch.dtype, fast: bool = False) -> Tensor:
    """Multiply along the rows of both: A Bᵀ, [r, k], [c, k] → [r, c].

    Args:
        a, b: fp8, contiguous.
        unit_a, unit_b: what their numbers stand for.
        dtype: of the result.
        fast: whether a GPU may accumulate in fewer bits than float32, which forward passes bear.
    """
    return torch._scaled_mm(a, b.t(), scale_a=unit_a, scale_b=unit_b, out_dtype=dtype, use_fast_accum=fast)


class Tensorwise(Recipe):
    """Tensorwise current scaling, through torch."""

    def quantize(self, x: Tensor, role: Role, weight: Tensor) -> Quantized:
        if role == "weight" and (gathered := gathered_codes(weight)) is not None:
            return Quantized(*gathered)
        return quantize(x, DTYPE_OF[role])

    def output(self, x: Quantized, weight: Quantized, dtype: torch.dtype) -> Tensor:
        return product(x.rows, weight.rows, x.unit, weight.unit, dtype, fast=True)

    def grad_input(self, grad: Quantized, weight: Quantized, dtype: torch.dtype) -> Tensor:
        return product(grad.rows, weight.columns, grad.unit, weight.unit, dtype)

    def grad_weight(self, grad: Quantized, x: Quantized, dtype: torch.dtype, total: Tensor | None) -> Tensor | None:
        made = product(grad.columns, x.columns, grad.unit, x.unit, dtype if total is None else torch.float32)
        if total is None:
            return made
        total.add_(made)
        return None

    def keep(self, x: Quantized) -> tuple[Sequence[Tensor | None], Restore]:
        # Rows are not needed again; whoever asks for them finds none.
        return (x.columns, x.unit), lambda kept: Quantized(kept[0].new_empty(0), kept[1], kept[0])


class Fp8Linear(torch.autograd.Function):
    """Y = X Wᵀ in fp8; arguments as in `nn.linear`: with `gather`, X is gathered here and again in backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, gather: Axis | None, later: WeightGradients | None, recipe: Recipe
    ) -> Tensor:
        ctx.weight, ctx.gather, ctx.later, ctx.recipe = weight, gather, later, recipe
        whole = x if gather is None else comm.all_gather(x, gather)
        xq = recipe.quantize(whole.flatten(0, -2), "input", weight)
        y = recipe.output(xq, recipe.quantized_weight(weight), x.dtype)
        # Gathered, this rank's 16-bit part is no larger than the whole in 8 bits.
        kept, ctx.restore = recipe.keep(xq) if gather is None else ((x,), None)
        ctx.save_for_backward(*kept)
        return y.view(*whole.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        weight, recipe = ctx.weight, ctx.recipe
        grad_x = grad_weight = None
        gq = recipe.quantize(grad.flatten(0, -2), "gradient", weight)
        if ctx.needs_input_grad[0]:
            grad_x = recipe.grad_input(gq, recipe.quantized_weight(weight), grad.dtype)
            grad_x = grad_x.view(*grad.shape[:-1], weight.shape[1])
            if ctx.gather is not None:
                grad_x = comm.reduce_scatter(grad_x, ctx.gather)
        if ctx.needs_input_grad[1]:
            compute = partial(_grad_weight, ctx.saved_tensors, ctx.restore, gq, weight, ctx.gather, recipe)
            grad_weight = weight_gradient(weight, compute, ctx.later)
        return grad_x, grad_weight, None, None, None


@torch.no_grad()  # when it was put off, it does not run inside autograd's own backward
def _grad_weight(
    kept: Sequence[Tensor], restore: Restore | None, grad: Any, weight: Tensor, gather: Axis | None, recipe: Recipe
) -> Tensor | None:
    """[m, f] with what forward kept of [m, h] → [f, h], or None where it was added to the weight's main gradient."""
    if gather is None:
        assert restore is not None
        x = restore(kept)
    else:
        x = recipe.quantize(comm.all_gather(kept[0], gather).flatten(0, -2), "input", weight)
    return recipe.grad_weight(grad, x, weight.dtype, main_grad(weight))


def require_fp8(device: torch.device) -> None:
    """Check before training that a device multiplies fp8.

    Raises: ConfigError: if it does not, naming it.
    """
    rule = ""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) < (8, 9):
            name = torch.cuda.get_device_name(device)
            rule = f"needs a GPU of compute capability 8.9 (Ada, Hopper) or newer; {name} has {major}.{minor}"
    else:
        one, tile = torch.ones((), device=device), torch.zeros(16, 16, dtype=torch.uint8, device=device)
        try:
            product(tile.view(BACKWARD), tile.view(FORWARD), one, one, torch.bfloat16)
        except (RuntimeError, NotImplementedError) as error:
            rule = f"is not multiplied by this torch on {device.type}: {str(error).splitlines()[0]}"
    if rule:
        raise ConfigError(Problem("train.dtype = fp8", rule, "use bf16"))
