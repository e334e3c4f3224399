"""Dynamic loss scaling for fp16 (Micikevicius et al. 2018, arXiv:1710.03740, section 3.2)."""

from dataclasses import dataclass

from megascratch.config import OptimConfig

_SMALLEST, _LARGEST = 1.0, 2.0**32


@dataclass
class LossScale:
    """The factor on the loss: halved when a gradient overflows, doubled after `window` steps without one.

    Attributes:
        value: current factor; stays 1 when `dynamic` is off.
        good_steps: steps since it last changed.
        window: good steps before it doubles.
        dynamic: whether it changes at all (fp16 only).
    """

    value: float
    window: int
    dynamic: bool
    good_steps: int = 0

    @classmethod
    def of(cls, optim: OptimConfig, dtype: str) -> "LossScale":
        """Return the scale that a run of this dtype starts with."""
        dynamic = dtype == "fp16"
        return cls(optim.loss_scale if dynamic else 1.0, optim.loss_scale_window, dynamic)

    def update(self, overflow: bool) -> None:
        """Take note of whether a step's gradients overflowed."""
        if not self.dynamic:
            return
        if overflow:
            self.value, self.good_steps = max(_SMALLEST, self.value / 2), 0
            return
        self.good_steps += 1
        if self.good_steps == self.window:
            self.value, self.good_steps = min(_LARGEST, self.value * 2), 0
