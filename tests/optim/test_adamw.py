"""AdamW against torch's own."""

import torch
from stepping import take_step

from megascratch.config import OptimConfig, ParallelConfig
from megascratch.dist.layout import parameter
from megascratch.dist.mesh import Mesh
from megascratch.optim import Optimizer, Unit


def _parameter(value: torch.Tensor, decay: bool = True) -> torch.nn.Parameter:
    param = parameter(tuple(value.shape), decay=decay, dtype=value.dtype, device=torch.device("cpu"))
    param.data.copy_(value)
    return param


def test_the_update_is_torchs() -> None:
    optim = OptimConfig(weight_decay=0.3, beta1=0.8, beta2=0.95, eps=1e-6, clip=0.0)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(50, dtype=torch.float64, generator=generator)
    ours, theirs = _parameter(start), torch.nn.Parameter(start.clone())
    reference = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.3, betas=(0.8, 0.95), eps=1e-6)
    optimizer = Optimizer([Unit.one([ours])], Mesh.serial(), optim, ParallelConfig())
    for _ in range(5):
        grad = torch.randn(50, dtype=torch.float64, generator=generator)
        theirs.grad = grad.clone()
        reference.step()
        optimizer.zero_grads()
        ours.backward(grad)
        take_step(optimizer, lr=0.01)
        torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-13, atol=1e-15)


def test_decay_can_be_left_out() -> None:
    params = [_parameter(torch.ones(3), decay) for decay in (False, True)]
    take_step(Optimizer([Unit.one(params)], Mesh.serial(), OptimConfig(weight_decay=0.5), ParallelConfig()), lr=0.1)
    assert params[0].tolist() == [1, 1, 1]
    torch.testing.assert_close(params[1].detach(), torch.full((3,), 0.95))
