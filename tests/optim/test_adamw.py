"""AdamW against torch's own."""

import torch

from megascratch.config import OptimConfig
from megascratch.optim.adamw import AdamW


def test_the_update_is_torchs() -> None:
    optim = OptimConfig(lr=0.01, weight_decay=0.3, beta1=0.8, beta2=0.95, eps=1e-6)
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(50, dtype=torch.float64, generator=generator)
    theirs = torch.nn.Parameter(ours.clone())
    reference = torch.optim.AdamW([theirs], lr=0.01, weight_decay=0.3, betas=(0.8, 0.95), eps=1e-6)
    rule = AdamW(optim)
    state = {name: torch.zeros_like(ours) for name in rule.state_names}
    for step in range(1, 6):
        grad = torch.randn(50, dtype=torch.float64, generator=generator)
        theirs.grad = grad.clone()
        reference.step()
        rule.update(ours, grad, state, step=step, lr=0.01, decay=True)
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-13, atol=1e-15)


def test_decay_can_be_left_out() -> None:
    rule = AdamW(OptimConfig(weight_decay=0.5))
    value = torch.ones(3)
    state = {name: torch.zeros_like(value) for name in rule.state_names}
    rule.update(value, torch.zeros(3), state, step=1, lr=0.1, decay=False)
    assert value.tolist() == [1, 1, 1]
    rule.update(value, torch.zeros(3), state, step=2, lr=0.1, decay=True)
    torch.testing.assert_close(value, torch.full((3,), 0.95))
