"""Muon: momentum whose matrices are made orthogonal before they are added (Jordan et al. 2024, "Muon").

Only directions of the gradient count, not their lengths: where the momentum is U S Vᵀ (its singular value
decomposition) the update is about U Vᵀ, so that rare directions move as far as common ones. Newton–Schulz gets there by
products alone: with X scaled to a norm of 1, X ← aX + b(XXᵀ)X + c(XXᵀ)²X maps every singular value s to
as + bs³ + cs⁵ and leaves U and V as they are. With the coefficients below small values grow by a = 3.4445 a step, and
five steps bring all that began above 0.01 between 0.68 and 1.14. By hand, for a singular value of 0.1:

    0.1 → 0.340 → 0.992 → 0.707 → 1.107 → 0.712

It acts on the logical matrices (`ParamSpec.matrices`): query, key, value, gate and up are each one, as they are in an
unfused model, whatever is fused or divided here. What is no matrix of a linear layer (embedding, head, norms, biases)
is left to AdamW.

Communication. A matrix must be whole on some rank, and no rank needs all of them. The ranks that hold a bucket whole
among them (tp under ZeRO-0, where data-parallel ranks do the same work as they do in AdamW; tp × dp × cp under ZeRO-1,
and where dp divides experts) deal the weights out; two all-to-alls bring the momentum to the owner and the update back
(`whole.WholeTensors`). They move twice the rank's run in the model's dtype, beside the reduce-scatter and the
all-gather that every rule has.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from megascratch import ops
from megascratch.config import OptimConfig
from megascratch.dist.layout import Matrices
from megascratch.dist.mesh import Mesh
from megascratch.optim.rule import OwnedRun, Update
from megascratch.optim.whole import Held, WholeTensors

_STEPS = 5
_A, _B, _C = 3.4445, -4.7750, 2.0315
_EPS = 1e-7

# How far an orthogonal [rows, columns] is moved, by the names that torch.optim.Muon gives them.
SCALES: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    # An orthogonal matrix has a root mean square of 1/√max(rows, columns); AdamW's updates have about 0.2 (Liu et al.
    # 2025, arXiv:2502.16982, section 2.2).
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
}


def orthogonalize(matrices: Tensor) -> Tensor:
    """Bring the singular values of each matrix near 1, by five Newton–Schulz steps in the matrices' own dtype.

    Args:
        matrices: [n, r, c].

    Returns: [n, r, c]; zeros where a matrix is zero.
    """
    if matrices.shape[1] > matrices.shape[2]:  # the smaller of the two Gram matrices
        return orthogonalize(matrices.mT).mT
    norm = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True, dtype=ops.acc_dtype(matrices))
    x = (matrices / norm.clamp_min(_EPS)).to(matrices.dtype)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x


class Muon:
    """The rule on the matrices of this rank's runs; the model's dtype is that of the products.

    Args:
        optim: `lr`, `muon_lr`, `muon_momentum` and `muon_scale` are read.
        runs: what this rank updates; every parameter in them has `ParamSpec.matrices`.
        mesh: this rank's place.
    """

    state_names: ClassVar[tuple[str, ...]] = ("momentum",)

    def __init__(self, optim: OptimConfig, runs: Sequence[OwnedRun], mesh: Mesh) -> None:
        self.optim, self.runs = optim, runs
        self.scale = SCALES[optim.muon_scale]
        divided = mesh.ep.size > 1 or any(run.bucket.sharded for run in runs)
        axis = mesh.stage if divided else mesh.tp
        self.wholes = WholeTensors(runs, mesh, axis, runs[0].bucket.values.dtype)

    @torch.no_grad()
    def update(self, grads: Sequence[Tensor], now: Update) -> None:
        """Update values and state in place; see `UpdateRule`.

        A step that is not taken is one of learning rate 0 in which every gradient is the momentum.
        """
        lr = torch.where(now.taken, now.lr, 0.0) * ((self.optim.muon_lr or self.optim.lr) / self.optim.lr)
        for run in self.runs:
            pace = run.bucket.key.pace
            run.master.mul_(1.0 - lr * pace.lr_scale * pace.weight_decay)
        for names in self.wholes.rounds:
            here = {name: held for name in names if (held := self.wholes.held.get(name)) is not None}
            ahead = {name: self._look_ahead(held, grads[held.run], now) for name, held in here.items()}
            directions = self._directions(self.wholes.collect(names, ahead))
            for name, piece in self.wholes.distribute(names, directions).items():
                held = here[name]
                run = self.runs[held.run]
                run.master[held.piece].addcmul_(piece, lr * run.bucket.key.pace.lr_scale, value=-1.0)
        for run in self.runs:
            if run.model is not None:
                run.model.copy_(run.master)

    def _look_ahead(self, held: Held, grad: Tensor, now: Update) -> Tensor:
        """Move the momentum of a piece by its gradient, in place, and return where the next one alike would take it."""
        share, momentum = self.optim.muon_momentum, self.runs[held.run].state["momentum"][held.piece]
        grad = torch.where(now.taken, grad[held.piece].to(momentum.dtype) * now.grad_factor, momentum)
        momentum.lerp_(grad, 1.0 - share)
        return grad.lerp(momentum, share).to(self.wholes.dtype)

    def _directions(self, wholes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Orthogonalise and scale the matrices of whole weights, those of one shape in one batch."""
        kinds = {name: self._kind(name) for name in wholes}
        matrices = {(name, i): m for name, whole in wholes.items() for i, m in enumerate(kinds[name].take(whole))}
        alike: dict[tuple[int, int], list[tuple[str, int]]] = defaultdict(list)
        for key, matrix in matrices.items():
            alike[matrix.shape[-2], matrix.shape[-1]].append(key)
        for (rows, columns), keys in alike.items():
            batches = [matrices[key].reshape(-1, rows, columns) for key in keys]
            made = orthogonalize(torch.cat(batches)) * self.scale(rows, columns)
            for key, part in zip(keys, made.split([len(batch) for batch in batches])):
                matrices[key] = part.view(matrices[key].shape)
        return {name: kind.join([matrices[name, i] for i in range(len(kind.parts))]) for name, kind in kinds.items()}

    def _kind(self, name: str) -> Matrices:
        kind = self.wholes.specs[name].matrices
        assert kind is not None
        return kind
