"""Buckets, clipping and loss scaling on one rank; the other layouts are in tests/engine/test_parity.py."""

import math
from typing import Any

import pytest
import torch
from stepping import take_step

from megascratch.config import OptimConfig, ParallelConfig
from megascratch.dist.layout import parameter
from megascratch.dist.mesh import Mesh
from megascratch.optim import LossScale, Optimizer, Unit, leaf_length
from megascratch.optim.tree import TreeSum


def _params(dtype: torch.dtype = torch.float64) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    params = []
    for shape, decay in (((3, 4), True), ((5,), False), ((2, 2), True)):
        param = parameter(shape, decay=decay, dtype=dtype, device=torch.device("cpu"))
        param.data.copy_(torch.randn(shape, generator=generator))
        params.append(param)
    return params


def _backward(params: list[torch.nn.Parameter]) -> None:
    sum((param * torch.arange(1.0, param.numel() + 1).view(param.shape)).sum() for param in params).backward()


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("bucket_numel", [1, 1000])
def test_a_step_is_torchs_clip_and_adamw(clip: float, bucket_numel: int) -> None:
    ours, theirs = _params(), _params()
    optim = OptimConfig(clip=clip, weight_decay=0.2, bucket_numel=bucket_numel)
    optimizer = Optimizer([Unit.one(ours)], Mesh.serial(), optim, ParallelConfig())
    groups = [{"params": [theirs[0], theirs[2]], "weight_decay": 0.2}, {"params": [theirs[1]], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), eps=1e-8)
    for _ in range(3):
        optimizer.zero_grads()
        _backward(ours)
        _backward(ours)  # two micro-batches add up
        grad_norm, _ = take_step(optimizer, lr=0.1, grad_scale=0.5)
        reference.zero_grad()
        _backward(theirs)
        norm = torch.nn.utils.clip_grad_norm_(theirs, clip or math.inf)
        reference.step()
        assert grad_norm == pytest.approx(norm.item(), rel=1e-12)
        for got, want in zip(ours, theirs):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_a_tree_of_leaves_by_hand() -> None:
    """12 micro-batches make 4 leaves of 3; two subtrees of one height become one, and buffers are used again."""
    assert [leaf_length(n) for n in (1, 2, 3, 6, 12, 40)] == [1, 1, 3, 3, 3, 5]
    tree, grads, seen = TreeSum(), torch.zeros(1), set()
    for leaf in ("a", "b", "c", "d", "e", "f", "g", "h"):
        seen.add(grads.data_ptr())
        grads += ord(leaf)
        grads = tree.add(grads)
        assert grads.item() == 0
    assert tree.total(unused=grads).item() == sum(map(ord, "abcdefgh"))
    assert len(seen | {grads.data_ptr()}) == 4, "log₂ 8, and the leaf"


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    params = _params()
    optimizer = Optimizer([Unit.one(params)], Mesh.serial(), OptimConfig(), ParallelConfig())
    before = [param.detach().clone() for param in params]
    (params[0].sum() * math.inf).backward()
    _, taken = take_step(optimizer, lr=0.1)
    assert not taken
    assert optimizer.updates == 0
    assert all(torch.equal(got, want) for got, want in zip(params, before))


def test_small_updates_survive_in_the_float32_masters_of_bf16_weights() -> None:
    params = _params(torch.bfloat16)
    optimizer = Optimizer([Unit.one(params)], Mesh.serial(), OptimConfig(weight_decay=0.0, clip=0.0), ParallelConfig())
    start = params[0].detach().clone()
    for _ in range(8):  # each update is a tenth of what one bf16 step at 1.0 is
        optimizer.zero_grads()
        _backward(params)
        take_step(optimizer, lr=8e-4)
    moved = optimizer.runs[0].master[: start.numel()].view(start.shape) - start.float()
    torch.testing.assert_close(moved, torch.full_like(moved, -8 * 8e-4), rtol=1e-3, atol=0)
    assert {"exp_avg", "exp_avg_sq", "master"} == {part.kind for part in optimizer.state_parts()}


def test_masters_in_halves_are_the_float32_ones_in_steps_and_checkpoints() -> None:
    """Saved by one, loaded by the other, both ways; bit for bit."""

    def run_of(halves: bool, steps: int, saved: dict[str, torch.Tensor] | None = None) -> tuple[Optimizer, dict]:
        params = _params(torch.bfloat16)
        optim = OptimConfig(weight_decay=0.1, clip=0.0, master_remainders=halves)
        optimizer = Optimizer([Unit.one(params)], Mesh.serial(), optim, ParallelConfig())
        if saved is not None:
            optimizer.updates = 4
            for part in optimizer.state_parts():
                part.tensor.copy_(saved[f"{part.kind} {part.spec.shape}"])
            optimizer.publish_masters()
        for step in range(steps):
            optimizer.zero_grads()
            _backward(params)
            take_step(optimizer, lr=1e-3 * (step + 1))
        return optimizer, {f"{part.kind} {part.spec.shape}": part.tensor.clone() for part in optimizer.state_parts()}

    plain, want = run_of(False, 4)
    halved, got = run_of(True, 4)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert all(run.remainder is not None for run in halved.runs)
    assert all(run.remainder is None for run in plain.runs)
    for halves in (False, True):
        _, straight = run_of(halves, 0, want)
        assert all(torch.equal(straight[name], want[name]) for name in want)
    ends = [run_of(halves, 2, want)[1] for halves in (False, True)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in want)
    assert not torch.equal(*(end[next(n for n in want if n.startswith("master"))] for end in (ends[0], want)))


def test_sums_of_gradients_have_memory_from_the_first_one_to_the_next_step() -> None:
    params = _params()
    optimizer = Optimizer([Unit.one(params)], Mesh.serial(), OptimConfig(bucket_numel=1), ParallelConfig())
    for _ in range(2):
        optimizer.zero_grads()
        assert [bucket._grads.untyped_storage().nbytes() for bucket in optimizer.buckets] == [0, 0, 0]
        (2 * params[0].sum()).backward()
        assert torch.equal(params[0].main_grad(), torch.full((3, 4), 2.0, dtype=torch.float64))
        assert sorted(bucket._grads.untyped_storage().nbytes() for bucket in optimizer.buckets) == [0, 0, 96]
        for bucket in optimizer.buckets:
            assert bucket.reduced_grads().sum() == (24.0 if bucket.spans[0].param is params[0] else 0.0)


AVERAGES = {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "bf16"}


@pytest.mark.parametrize(
    ("keys", "grads", "averages", "total"),
    [
        ({}, 4, (4, 4), 18),
        ({"master_remainders": True}, 4, (4, 4), 16),
        ({"master_remainders": True, **AVERAGES}, 4, (2, 2), 12),
        ({"master_remainders": True, **AVERAGES, "main_grads_dtype": "bf16"}, 2, (2, 2), 10),
        ({"exp_avg_sq_dtype": "bf16", "main_grads_dtype": "bf16"}, 2, (4, 2), 14),
        ({"master_weights": False}, 2, (2, 2), 8),
        ({"master_weights": False, "main_grads_dtype": "fp32", "exp_avg_sq_dtype": "fp32"}, 4, (2, 4), 12),
    ],
)
def test_bytes_a_parameter(keys: dict[str, Any], grads: int, averages: tuple[int, int], total: int) -> None:
    """As the table of `precision.py` has them; and whatever is kept how, a step goes the same way."""
    params, wide = _params(torch.bfloat16), _params(torch.bfloat16)
    optimizer, reference = (
        Optimizer([Unit.one(p)], Mesh.serial(), OptimConfig(weight_decay=0.0, **k), ParallelConfig())
        for p, k in ((params, keys), (wide, {}))
    )
    kept = 0
    for run in optimizer.runs:
        assert run.bucket.grads.itemsize == grads
        assert (run.state["exp_avg"].itemsize, run.state["exp_avg_sq"].itemsize) == averages
        tensors = [run.bucket.values, run.bucket.grads, *run.state.values()]
        if run.has_master:
            tensors.append(run.values if run.remainder is None else run.remainder)
        kept += sum(tensor.nbytes for tensor in tensors)
    assert kept == total * sum(param.numel() for param in params)
    for _ in range(3):
        for some, step in ((params, optimizer), (wide, reference)):
            step.zero_grads()
            _backward(some)
            take_step(step, lr=0.01)
    for got, want in zip(params, wide):
        torch.testing.assert_close(got, want, rtol=2**-6, atol=2**-8)


def test_without_masters_all_is_bf16_and_the_step_torchs() -> None:
    ours, theirs = _params(torch.bfloat16), _params(torch.bfloat16)
    optim = OptimConfig(weight_decay=0.0, clip=0.0, master_weights=False)
    optimizer = Optimizer([Unit.one(ours)], Mesh.serial(), optim, ParallelConfig())
    reference = torch.optim.AdamW(theirs, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True)
    for _ in range(3):
        optimizer.zero_grads()
        reference.zero_grad()
        _backward(ours)
        _backward(theirs)
        take_step(optimizer, lr=0.1)
        reference.step()
    for got, want in zip(ours, theirs):
        torch.testing.assert_close(got, want, rtol=2**-7, atol=0)
    assert {part.kind: part.tensor.dtype for part in optimizer.state_parts()} == {
        "exp_avg": torch.bfloat16,
        "exp_avg_sq": torch.bfloat16,
    }


def test_the_loss_scale_halves_on_overflow_and_doubles_after_its_window() -> None:
    scale = LossScale.of(OptimConfig(loss_scale=1024.0, loss_scale_window=3), "fp16")
    seen = []
    for overflow in (True, False, False, True, False, False, False, False):
        scale.update(overflow)
        seen.append(scale.value)
    assert seen == [512, 512, 512, 256, 256, 256, 512, 512]
    fixed = LossScale.of(OptimConfig(), "bf16")
    fixed.update(overflow=True)
    assert fixed.value == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_offloaded_run_has_storages_of_its_own_and_gives_the_model_its_values(dtype: torch.dtype) -> None:
    """On a CPU both are in the same memory, but the optimizer's storages are apart from the model's."""
    optimizers = {}
    for offload in (False, True):
        params = _params(dtype)
        parallel = ParallelConfig(offload_optimizer=offload)
        optimizers[offload] = optimizer = Optimizer([Unit.one(params)], Mesh.serial(), OptimConfig(), parallel)
        _backward(params)
        take_step(optimizer, lr=0.1)
    for here, away in zip(optimizers[False].runs, optimizers[True].runs, strict=True):
        assert away.master.data_ptr() != away.bucket.run.data_ptr()
        assert (here.master.data_ptr() == here.bucket.run.data_ptr()) == (dtype is torch.float32)
        assert torch.equal(away.bucket.run, away.master.to(dtype)), "the model has the new values"
        assert torch.equal(away.bucket.run, here.bucket.run)
        assert all(torch.equal(away.state[name], here.state[name]) for name in here.state)
