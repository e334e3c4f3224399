"""transformer-engine's recipes for the products of our linear layers (`train.fp8_recipe`), where it is installed.

Weights, collectives, put-off weight gradients and sums of gradients stay ours: of transformer-engine only its
quantisers and its product are called (`ops.adapters.call`), not its modules with their contexts. What has a scale:

    recipe       input, gradient           weight       format        sides divide by
    delayed      a tensor                  a tensor     e4m3, e5m2    16
    blockwise    128 numbers of a row      128 × 128    e4m3          128
    mxfp8        32 numbers of a row       same         e4m3          32

`blockwise` and `mxfp8` scale by what they quantise. Delayed scaling takes a tensor's largest magnitude in the steps
before, so that measuring and rounding are one pass over memory. By hand, format up to 448, history of 3 steps:

    step                        1      2      3      4      5
    largest |x| in it           2      4      1      1      1       over all micro-batches and ranks of the stage
    in the steps before         –      2      4      4      4
    scale                     224    224    112    112    112       in step 2 all above 2 becomes 448

A scale holds for a whole step, whatever the schedule, and running a layer again measures the same; step 1 has no
history and scales each tensor by its own magnitude. transformer-engine's modules differ in three ways: they begin with
a scale of 1, note one entry a micro-batch, and count evaluation.

Source: https://docs.nvidia.com/deeplearning/transformer-engine/user-guide/api/common.html (recipes)
"""

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megascratch.dist import comm
from megascratch.dist.layout import ParamSpec, spec_of
from megascratch.dist.mesh import Mesh
from megascratch.errors import ConfigError, MissingDependency, Problem
from megascratch.nn.fp8 import DTYPE_OF, FORWARD, SMALLEST, Recipe, Restore, Role, Tensorwise, require_fp8
from megascratch.ops.adapters import call

HISTORY_STEPS = 1024  # transformer-engine's own default
_OLDEST = "2.10"  # the first release whose quantisers are public, and whose product brings its own workspace
_NEEDED = ("Float8Quantizer", "Float8BlockQuantizer", "MXFP8Quantizer", "prepare_for_saving", "restore_from_saved")
_ROLES: tuple[Role, ...] = ("input", "weight", "gradient")


@dataclass(frozen=True)
class Library:
    """What is called of transformer-engine.

    Attributes:
        pytorch: its module.
        product: its matrix product.
        formats: its names of torch's fp8 dtypes.
    """

    pytorch: ModuleType
    product: Callable[..., Any]
    formats: dict[torch.dtype, Any]

    @classmethod
    def load(cls, key: str) -> "Library":
        """Return it.

        Args:
            key: what asks for it, for the message.

        Raises: MissingDependency: if it is not installed, does not load, or is too old.
        """
        remedy = f"install transformer-engine {_OLDEST} or newer (transformer-engine[pytorch]), or use tensorwise"
        try:
            pytorch = importlib.import_module("transformer_engine.pytorch")
            product = importlib.import_module("transformer_engine.pytorch.cpp_extensions").general_gemm
            names = importlib.import_module("transformer_engine_torch").DType
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            rule = f"needs transformer-engine, which does not load here: {str(error).splitlines()[0]}"
            raise MissingDependency(Problem(key, rule, remedy)) from None
        if lacking := [name for name in _NEEDED if not hasattr(pytorch, name)]:
            rule = f"needs transformer-engine {_OLDEST} or newer; the one installed has no {lacking[0]}"
            raise MissingDependency(Problem(key, rule, remedy))
        return cls(pytorch, product, {torch.float8_e4m3fn: names.kFloat8E4M3, torch.float8_e5m2: names.kFloat8E5M2})

    def quantizer(self, name: str, dtype: torch.dtype, **arguments: Any) -> Any:
        """Make one of its quantisers, which makes of a matrix what is multiplied along rows and along columns."""
        made = call(
            getattr(self.pytorch, name), fp8_dtype=self.formats[dtype], rowwise=True, columnwise=True, **arguments
        )
        made.internal = True  # of the matrix, plain containers of tensors, which autograd need not know
        return made


class EngineRecipe(Recipe):
    """Quantise by transformer-engine's quantisers, and multiply by its product.

    Args:
        library: as it was loaded.
        quantizers: by role, those of every layer.
    """

    def __init__(self, library: Library, quantizers: Mapping[Role, Any]) -> None:
        self.library, self.quantizers = library, quantizers

    def quantize(self, x: Tensor, role: Role, weight: Tensor) -> Any:
        return self.quantizers[role](x.detach().contiguous())

    def output(self, x: Any, weight: Any, dtype: torch.dtype) -> Tensor:
        return self._product(weight, x, "TN", dtype, use_split_accumulator=False)

    def grad_input(self, grad: Any, weight: Any, dtype: torch.dtype) -> Tensor:
        return self._product(weight, grad, "NN", dtype, use_split_accumulator=True, grad=True)

    def grad_weight(self, grad: Any, x: Any, dtype: torch.dtype, total: Tensor | None) -> Tensor | None:
        into = {} if total is None else {"out": total, "accumulate": True}
        made = self._product(
            x, grad, "NT", dtype if total is None else total.dtype, use_split_accumulator=True, grad=True, **into
        )
        return made if total is None else None

    def keep(self, x: Any) -> tuple[Sequence[Tensor | None], Restore]:
        x.update_usage(rowwise_usage=False, columnwise_usage=True)
        tensors, containers = self.library.pytorch.prepare_for_saving(x)
        return tensors, partial(self._restored, containers)

    def _restored(self, containers: list[Any], kept: Sequence[Tensor]) -> Any:
        return call(self.library.pytorch.restore_from_saved, tensors=containers, saved_tensors=list(kept))[0]

    def _product(self, a: Any, b: Any, layout: str, dtype: torch.dtype, **arguments: Any) -> Tensor:
        """Multiply as cuBLAS sees it, columns first: TN makes B Aᵀ, NN makes B A, NT makes Bᵀ A."""
        made: Tensor = call(self.library.product, A=a, B=b, layout=layout, out_dtype=dtype, **arguments)[0]
        return made


class DelayedScaling(EngineRecipe):
    """Scale by the largest magnitude of the steps before.

    Args:
        library: as it was loaded.
        mesh: this rank's place; the ranks that hold a layer agree on its scales.

    Attributes:
        history: [n, 3, HISTORY_STEPS], largest magnitudes of each layer's input, weight and gradient, newest first.
        amaxes: [n, 3], those of this step so far, on this rank.
        scales: [n, 3], of this step.
    """

    def __init__(self, library: Library, mesh: Mesh) -> None:
        super().__init__(library, {})
        self.mesh = mesh
        self._specs: list[ParamSpec] = []
        self._rows: dict[str, int] = {}
        self._largest = torch.tensor([torch.finfo(DTYPE_OF[role]).max for role in _ROLES], device=mesh.device)
        self._quantizers: list[dict[Role, Any]] = []
        self._knows = False  # whether the history has an entry

    def attach(self, weights: Iterable[Tensor]) -> None:
        self._specs = sorted((spec_of(weight) for weight in weights), key=lambda spec: spec.name)  # ranks line up
        self._rows = {spec.name: row for row, spec in enumerate(self._specs)}
        n = len(self._specs)
        self.history = torch.zeros(n, len(_ROLES), HISTORY_STEPS, device=self.mesh.device)
        self.amaxes = torch.zeros(n, len(_ROLES), device=self.mesh.device)
        self.scales = torch.ones_like(self.amaxes)
        self._quantizers = [
            {
                role: self.library.quantizer(
                    "Float8Quantizer",
                    DTYPE_OF[role],
                    scale=self.scales[row, i : i + 1],
                    amax=self.amaxes[row, i : i + 1],
                )
                for i, role in enumerate(_ROLES)
            }
            for row in range(n)
        ]

    def quantize(self, x: Tensor, role: Role, weight: Tensor) -> Any:
        quantizer = self._quantizers[self._rows[spec_of(weight).name]][role]
        if not self._knows:
            magnitude = torch.linalg.vector_norm(x.detach(), ord=torch.inf).float().clamp_min(SMALLEST)
            quantizer.scale.copy_(torch.finfo(DTYPE_OF[role]).max / magnitude)
        return quantizer(x.detach().contiguous())

    def begin_step(self) -> None:
        self.amaxes.zero_()  # evaluation has left some

    @torch.no_grad()
    def end_step(self) -> None:
        amaxes = self.amaxes
        if self._specs:
            amaxes = comm.max_over(amaxes, self.mesh.stage)
        if any("mirror" in spec.grad_axes for spec in self._specs):  # the model is there twice
            amaxes = comm.max_over(amaxes, self.mesh.mirror)
        self.history.copy_(self.history.roll(1, dims=-1))
        self.history[..., 0] = torch.where(amaxes.isfinite(), amaxes, 0.0)  # an overflow says nothing
        self._knows = True
        self._rescale()

    def state(self) -> list[tuple[ParamSpec, Tensor]]:
        return list(zip(self._specs, self.history))

    def refresh(self) -> None:
        self._knows = bool(self.history.any())
        self._rescale()

    def _rescale(self) -> None:
        magnitudes = self.history.amax(-1)
        scales = self._largest / magnitudes.clamp_min(SMALLEST)
        self.scales.copy_(torch.where(magnitudes > 0, scales, self.scales))


def _blockwise(library: Library, mesh: Mesh) -> Recipe:
    dims: dict[Role, int] = {"input": 1, "weight": 2, "gradient": 1}
    make = partial(library.quantizer, "Float8BlockQuantizer", FORWARD)
    return EngineRecipe(library, {role: make(block_scaling_dim=dim) for role, dim in dims.items()})


def _mxfp8(library: Library, mesh: Mesh) -> Recipe:
    return EngineRecipe(library, {role: library.quantizer("MXFP8Quantizer", FORWARD) for role in _ROLES})


# By recipe: which question transformer-engine answers about the device, and what makes it.
_RECIPES: dict[str, tuple[str, Callable[[Library, Mesh], Recipe]]] = {
    "delayed": ("is_fp8_available", DelayedScaling),
    "blockwise": ("is_fp8_block_scaling_available", _blockwise),
    "mxfp8": ("is_mxfp8_available", _mxfp8),
}


def recipe_of(name: str, mesh: Mesh) -> Recipe:
    """Return the recipe that `train.fp8_recipe` names.

    Raises:
        MissingDependency: if transformer-engine, which it needs, is not there or too old.
        ConfigError: if the device does not have what it needs.
    """
    if name == "tensorwise":
        require_fp8(mesh.device)
        return Tensorwise()
    key = f"train.fp8_recipe = {name}"
    library = Library.load(key)
    question, make = _RECIPES[name]
    has, reason = getattr(library.pytorch, question)(return_reason=True)
    if not has:
        raise ConfigError(Problem(key, f"is not for this device: {reason}", "use another recipe, or bf16"))
    return make(library, mesh)
