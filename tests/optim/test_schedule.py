"""Learning-rate curves at the points that can be worked out by hand."""

import math

import pytest

from megascratch.config import OptimConfig
from megascratch.optim import learning_rate
from megascratch.optim.schedule import CURVES


def _optim(**keys: object) -> OptimConfig:
    return OptimConfig(**{"lr": 1.0, "min_lr": 0.1, "warmup_steps": 10, "decay_steps": 110, **keys})


@pytest.mark.parametrize("schedule", CURVES)
def test_warm_up_rises_linearly_and_meets_the_curve(schedule: str) -> None:
    optim = _optim(schedule=schedule, decay_steps=20 if schedule == "wsd" else 110)
    assert [learning_rate(optim, step, 110) for step in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])
    assert learning_rate(optim, 11, 110) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("cosine", 60, 0.55),
        ("cosine", 35, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))),
        ("cosine", 110, 0.1),
        ("cosine", 500, 0.1),
        ("linear", 60, 0.55),
        ("linear", 110, 0.1),
        ("constant", 110, 1.0),
        ("inverse_sqrt", 40, 0.5),
        ("inverse_sqrt", 5000, 0.1),
    ],
)
def test_curves(schedule: str, step: int, expected: float) -> None:
    assert learning_rate(_optim(schedule=schedule), step, 110) == pytest.approx(expected)


def test_wsd_stays_and_then_falls_over_its_last_steps() -> None:
    optim = _optim(schedule="wsd", decay_steps=20)
    assert [learning_rate(optim, step, 100) for step in (11, 80, 90, 100)] == pytest.approx([1.0, 1.0, 0.55, 0.1])


def test_no_warm_up_starts_on_the_curve() -> None:
    assert learning_rate(_optim(schedule="constant", warmup_steps=0), 1, 10) == 1.0
    assert learning_rate(_optim(schedule="inverse_sqrt", warmup_steps=0), 4, 10) == 0.5
