"""Temperature, top-k and top-p against `transformers`; draws against the probabilities they stand for."""

from typing import Any

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from megascratch.errors import ConfigError
from megascratch.infer import Sampling, filtered, sample

LOGITS = 3 * torch.randn(5, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 1, 1.0), (1.3, 7, 1.0), (1.0, 0, 0.9), (0.5, 0, 1e-9), (2.0, 10, 0.6)],
)
def test_filters_equal_transformers(temperature: float, top_k: int, top_p: float) -> None:
    expected: Any = TemperatureLogitsWarper(temperature)(None, LOGITS)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    torch.testing.assert_close(filtered(LOGITS, Sampling(temperature, top_k, top_p)), expected, rtol=1e-12, atol=1e-12)


def test_the_worked_example() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    probs = filtered(logits, Sampling(top_k=3, top_p=0.6)).softmax(-1)
    torch.testing.assert_close(probs, torch.tensor([[0.625, 0.375, 0, 0]], dtype=torch.float64), rtol=1e-6, atol=0)


def test_top_k_beyond_the_vocabulary_keeps_all() -> None:
    assert torch.equal(filtered(LOGITS, Sampling(top_k=500)), LOGITS)


def test_draws_follow_the_probabilities() -> None:
    sampling = Sampling(temperature=1.5, top_k=6, seed=3)
    logits = LOGITS[:1].expand(20_000, -1)
    counts = sample(logits, sampling, position=9).bincount(minlength=50)
    expected = filtered(LOGITS[:1], sampling).softmax(-1)[0] * 20_000
    assert not counts[expected == 0].any()
    chi_squared = ((counts - expected).square() / expected)[expected > 0].sum()
    assert chi_squared < 20.5  # 5 degrees of freedom: exceeded once in a thousand


def test_a_seed_a_row_and_a_position_decide_the_draw() -> None:
    flat = torch.zeros(4, 1000)
    draws = sample(flat, Sampling(seed=1), position=5)
    assert torch.equal(draws, sample(flat, Sampling(seed=1), position=5))
    assert torch.equal(draws[:2], sample(flat[:2], Sampling(seed=1), position=5))  # other rows do not matter
    assert len(set(draws.tolist())) == 4
    assert not torch.equal(draws, sample(flat, Sampling(seed=2), position=5))
    assert not torch.equal(draws, sample(flat, Sampling(seed=1), position=6))


def test_zero_temperature_is_greedy() -> None:
    assert torch.equal(sample(LOGITS, Sampling(temperature=0, top_k=3, top_p=0.5), 0), LOGITS.argmax(-1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.5}, r"temperature = -0.5 +must be 0 or more"),
        ({"temperature": float("nan")}, r"temperature = nan +must be 0 or more"),
        ({"temperature": float("inf")}, r"temperature = inf +must be 0 or more"),
        ({"top_k": -1}, r"top_k = -1 +must be 0 or more"),
        ({"top_p": 0.0}, r"top_p = 0.0 +must be more than 0 and at most 1"),
        ({"top_p": 1.5}, r"top_p = 1.5 +must be more than 0 and at most 1"),
        ({"temperature": -1.0, "top_k": -1, "top_p": 2.0}, r"3 problems in the sampling options"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**options)
