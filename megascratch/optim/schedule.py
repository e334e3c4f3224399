"""Learning rate as a function of the step.

Every schedule rises linearly to `lr` over `warmup_steps`, then follows its own curve down to `min_lr`. Step t counts
from 1, and the first update already moves.
"""

import math
from collections.abc import Callable

from megascratch.config import OptimConfig

Curve = Callable[[OptimConfig, int, int], float]


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """Return the learning rate of update `step` of `steps`, 1 ≤ step.

    Args:
        optim: resolved, so `decay_steps` is given.
        step: number of this update.
        steps: number of updates in the whole run.
    """
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    return CURVES[optim.schedule](optim, step, steps)


def _share(step: int, first: int, last: int) -> float:
    """Return how far `step` has come from `first` to `last`, between 0 and 1."""
    return min(1.0, max(0.0, (step - first) / max(1, last - first)))


def _cosine(optim: OptimConfig, step: int, steps: int) -> float:
    share = _share(step, optim.warmup_steps, optim.decay_steps or steps)
    return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1.0 + math.cos(math.pi * share))


def _linear(optim: OptimConfig, step: int, steps: int) -> float:
    return optim.lr - (optim.lr - optim.min_lr) * _share(step, optim.warmup_steps, optim.decay_steps or steps)


def _constant(optim: OptimConfig, step: int, steps: int) -> float:
    return optim.lr


def _wsd(optim: OptimConfig, step: int, steps: int) -> float:
    """Stay at `lr`, then fall linearly over the last `decay_steps` (Hägele et al. 2024, arXiv:2405.18392)."""
    return optim.lr - (optim.lr - optim.min_lr) * _share(step, steps - (optim.decay_steps or steps), steps)


def _inverse_sqrt(optim: OptimConfig, step: int, steps: int) -> float:
    """Fall as 1/√t from the end of the warm-up (Vaswani et al. 2017, arXiv:1706.03762, eq. 3)."""
    return max(optim.min_lr, optim.lr * math.sqrt(max(1, optim.warmup_steps) / step))


CURVES: dict[str, Curve] = {
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
    "wsd": _wsd,
    "inverse_sqrt": _inverse_sqrt,
}
