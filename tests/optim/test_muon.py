"""Muon against torch.optim.Muon on the unfused matrices; whole models on other layouts: tests/engine/test_parity.py."""

import math

import pytest
import torch
from logical import to_local
from stepping import take_step

from megascratch.config import OptimConfig, ParallelConfig
from megascratch.dist.layout import Matrices, Split, name_parameters, parameter
from megascratch.dist.mesh import Mesh, MeshSpec
from megascratch.dist.testing import distributed
from megascratch.optim import Optimizer, Unit, whole
from megascratch.optim.muon import Muon, orthogonalize

CPU = torch.device("cpu")

# Grouped QKV of two key/value heads, gate and up, one that is tall, two experts, and what is no matrix.
QKV, GATE_UP, TALL = Matrices((4, 2, 2), groups=2), Matrices((6, 6)), Matrices((20,))
WEIGHTS: dict[str, tuple[tuple[int, ...], Matrices | None, Split | None]] = {
    "qkv": ((16, 8), QKV, Split(0, "tp")),
    "gate_up": ((12, 8), GATE_UP, Split(0, "tp", (6, 6))),
    "tall": ((20, 6), TALL, Split(1, "tp")),
    "experts": ((2, 12, 8), GATE_UP, None),
    "embed": ((7, 4), None, None),
}


def _model(dtype: torch.dtype, mesh: Mesh) -> torch.nn.Module:
    """A module with these weights, the same logical values on every layout."""
    model, generator = torch.nn.Module(), torch.Generator().manual_seed(3)
    for name, (shape, matrices, split) in WEIGHTS.items():
        value = to_local(torch.randn(shape, dtype=torch.float64, generator=generator), split, mesh)
        param = parameter(
            shape, splits=(split,) if split else (), matrices=matrices, sizes=mesh.spec.sizes, dtype=dtype, device=CPU
        )
        param.data.copy_(value)
        model.register_parameter(name, param)
    name_parameters(model)
    return model


def _unfused(tensor: torch.Tensor, matrices: Matrices | None) -> list[torch.Tensor]:
    """Take a weight apart by hand, row by row, into plain matrices."""
    if matrices is None:
        return [tensor]
    rows: list[list[torch.Tensor]] = [[] for _ in matrices.parts]
    start = 0
    for _ in range(matrices.groups):
        for i, part in enumerate(matrices.parts):
            rows[i].append(tensor[..., start : start + part, :])
            start += part
    joined = [torch.cat(parts, dim=-2) for parts in rows]
    return joined if tensor.ndim == 2 else [matrix for batch in joined for matrix in batch]


def _grads(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    grads = {name: torch.randn(shape, generator=generator).bfloat16() for name, (shape, *_) in WEIGHTS.items()}
    return {name: grad.double() for name, grad in grads.items()}  # exact in every dtype


def _our_steps(dtype: torch.dtype, optim: OptimConfig, mesh: Mesh, zero: int = 0) -> Optimizer:
    model = _model(dtype, mesh)
    optimizer = Optimizer([Unit.one(model.parameters())], mesh, optim, ParallelConfig(zero=zero))
    for step in range(1, 4):
        optimizer.zero_grads()
        grads = _grads(step)
        for name, param in model.named_parameters():
            param.backward(to_local(grads[name], WEIGHTS[name][2], mesh).to(dtype) / mesh.data.size)
        take_step(optimizer, lr=0.01 * step, grad_scale=2.0)
    return optimizer


def _masters(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    return {
        span.spec.name: run.master[span.start : span.stop].view(span.param.shape)
        for run in optimizer.runs
        for span in run.bucket.spans
    }


def _their_steps(dtype: torch.dtype, optim: OptimConfig) -> dict[str, list[torch.Tensor]]:
    params = dict(_model(dtype, Mesh.serial()).named_parameters())
    theirs = {
        name: [torch.nn.Parameter(m.to(torch.float64 if dtype == torch.float64 else torch.float32)) for m in matrices]
        for name, param in params.items()
        for matrices in [_unfused(param.detach(), WEIGHTS[name][1])]
    }
    ratio = (optim.muon_lr or optim.lr) / optim.lr
    muon = torch.optim.Muon(
        [m for name in theirs if name != "embed" for m in theirs[name]],
        weight_decay=optim.weight_decay,
        momentum=optim.muon_momentum,
        adjust_lr_fn=optim.muon_scale,
    )
    adamw = torch.optim.AdamW(theirs["embed"], betas=(0.9, 0.95), weight_decay=optim.weight_decay)
    for step in range(1, 4):
        for name, grad in _grads(step).items():
            for m, g in zip(theirs[name], _unfused(2.0 * grad, WEIGHTS[name][1]), strict=True):
                m.grad = g.to(m.dtype)
        muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"] = 0.01 * step * ratio, 0.01 * step
        muon.step()
        adamw.step()
    return {name: [m.detach() for m in matrices] for name, matrices in theirs.items()}


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_update_is_torchs(scale: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch multiplies in bfloat16 whatever it is given; in float64 the two are compared without that cast."""
    if dtype == torch.float64:
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    optim = OptimConfig.model_validate(
        {"name": "muon", "muon_scale": scale, "lr": 0.02, "muon_lr": 0.05, "clip": 0.0, "weight_decay": 0.2}
    )
    ours, theirs = _masters(_our_steps(dtype, optim, Mesh.serial())), _their_steps(dtype, optim)
    tolerance = {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 0.0, "atol": 4e-3}
    for name in WEIGHTS:
        for got, want in zip(_unfused(ours[name], WEIGHTS[name][1]), theirs[name], strict=True):
            torch.testing.assert_close(got, want, **tolerance)


@distributed(world=4)
def test_pieces_are_brought_together_and_taken_back_in_rounds() -> None:
    """One tensor a rank and round, cut by tp and by ZeRO-1 at places that divide rows."""
    whole._ROUND_NUMEL = 1
    mesh = Mesh.create(MeshSpec(dp=2, tp=2), CPU)
    optimizer = Optimizer(
        [Unit.one(_model(torch.float64, mesh).parameters())], mesh, OptimConfig(name="muon"), ParallelConfig(zero=1)
    )
    serial = dict(_model(torch.float64, Mesh.serial()).named_parameters())
    rule = optimizer.rules["muon"]
    assert isinstance(rule, Muon)
    assert [len(names) for names in rule.wholes.rounds] == [4]
    seen = 0
    for names in rule.wholes.rounds:
        held = {name: held for name in names if (held := rule.wholes.held.get(name))}
        pieces = {name: rule.runs[at.run].master[at.piece] for name, at in held.items()}
        wholes = rule.wholes.collect(names, pieces)
        for name, tensor in wholes.items():
            assert torch.equal(tensor, serial[name])
        back = rule.wholes.distribute(names, {name: -tensor for name, tensor in wholes.items()})
        assert back.keys() == pieces.keys()
        assert all(torch.equal(back[name], -pieces[name]) for name in back)
        seen += len(wholes)
    assert seen == 1, "every rank has one tensor of the four"


@distributed(world=4)
def test_experts_and_rounds_give_the_update_of_one_rank() -> None:
    whole._ROUND_NUMEL = 1
    mesh, optim = Mesh.create(MeshSpec(dp=2, tp=2), CPU), OptimConfig(name="muon", bucket_numel=150)
    want = _masters(_our_steps(torch.float64, optim, Mesh.serial()))
    for run in _our_steps(torch.float64, optim, mesh, zero=1).runs:
        for span in run.bucket.spans:
            split = WEIGHTS[span.spec.name][2]
            torch.testing.assert_close(
                span.param.detach(), to_local(want[span.spec.name], split, mesh), rtol=1e-11, atol=1e-12
            )


@pytest.mark.parametrize(("rows", "columns"), [(6, 6), (4, 9), (9, 4), (1, 5), (1, 1)])
def test_singular_values_come_near_one(rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(3, rows, columns, dtype=torch.float64, generator=generator)
    matrices[1] *= 1e6
    u, s, v = torch.linalg.svd(orthogonalize(matrices), full_matrices=False)
    assert s.min() > 0.6 and s.max() < 1.2
    u0, _, v0 = torch.linalg.svd(matrices, full_matrices=False)
    torch.testing.assert_close(u @ v, u0 @ v0)  # the polar factor, unique where the singular values are not


def test_a_zero_matrix_stays_zero_and_half_precision_keeps_its_dtype() -> None:
    made = orthogonalize(torch.zeros(2, 3, 4, dtype=torch.bfloat16))
    assert made.dtype == torch.bfloat16 and not made.any()


@pytest.mark.parametrize(("scale", "rms"), [("match_rms_adamw", 0.2), ("original", math.sqrt(2) / math.sqrt(64))])
def test_scales_by_their_definition(scale: str, rms: float) -> None:
    """Of an update of a 64 × 32 matrix, whose orthogonal factor has the root mean square 1/√64."""
    param = parameter((64, 32), matrices=Matrices((64,)), dtype=torch.float64, device=CPU)
    torch.nn.init.zeros_(param)
    optim = OptimConfig.model_validate({"name": "muon", "muon_scale": scale, "weight_decay": 0.0})
    optimizer = Optimizer([Unit.one([param])], Mesh.serial(), optim, ParallelConfig())
    param.backward(torch.randn(64, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    take_step(optimizer, lr=1.0)
    assert param.detach().square().mean().sqrt().item() == pytest.approx(rms, rel=0.15)
