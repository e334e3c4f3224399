"""From logits to a token: temperature, then top-k, then top-p, then one draw.

By hand: probabilities (0.5, 0.3, 0.15, 0.05) at temperature 1. top_k = 3 leaves (0.5, 0.3, 0.15) / 0.95 =
(0.526, 0.316, 0.158). top_p = 0.6 then keeps tokens, likeliest first, until they hold 60 %: the first holds 53 %, with
the second it is 84 %, so two stay: (0.625, 0.375). A uniform number u ≤ 0.625 picks token 0, any other token 1.

The order is that of Hugging Face's `transformers`. Nucleus sampling (top-p): Holtzman et al. 2020, arXiv:1904.09751.

The uniform number is a function of (seed, sequence, position) alone (`ops.random`), so the same seed gives the same
text whatever the number of ranks or of other sequences, as far as their rounding agrees.

Legend: `b` rows, `v` vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megascratch import ops
from megascratch.errors import ConfigError, Problem
from megascratch.ops.random import stream_key, uniform

_LONGEST = 1 << 32  # positions of a sequence: where the next one's random numbers begin


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Attributes:
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: choose among the k likeliest, and those as likely as the last of them; 0: among all.
        top_p: choose among the fewest likeliest tokens that hold this share of the probability.
        seed: of the draws.

    Raises: ConfigError: with every value that makes no sense.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            rule = "must be 0 or more"
            problems.append(Problem(f"temperature = {self.temperature}", rule, "0 always takes the likeliest token"))
        if self.top_k < 0:
            problems.append(Problem(f"top_k = {self.top_k}", "must be 0 or more", "0 chooses among all tokens"))
        if not 0 < self.top_p <= 1:
            rule = "must be more than 0 and at most 1"
            problems.append(Problem(f"top_p = {self.top_p}", rule, "1 chooses among all tokens"))
        if problems:
            raise ConfigError(problems, "the sampling options")


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Apply temperature, top-k and top-p.

    Args:
        logits: [b, v], no padding columns.
        sampling: its temperature is more than 0.

    Returns: [b, v] float64, −∞ where a token may not be chosen.
    """
    scores = logits.double()
    if sampling.temperature != 1:
        scores = scores / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        weakest = scores.topk(sampling.top_k).values[:, -1:]
        scores = scores.masked_fill(scores < weakest, -torch.inf)
    if sampling.top_p < 1:
        probs, order = scores.softmax(-1).sort(dim=-1, descending=True)
        enough = probs.cumsum(-1) - probs >= sampling.top_p  # the likelier ones already hold the share
        scores = scores.masked_fill(torch.zeros_like(enough).scatter(-1, order, enough), -torch.inf)
    return scores


def sample(logits: Tensor, sampling: Sampling, position: int | Tensor, sequence: Tensor | None = None) -> Tensor:
    """Choose a token for each row.

    Args:
        logits: [b, v], no padding columns.
        sampling: how.
        position: of the chosen token in its sequence; one for all, or [b] int64.
        sequence: [b] int64, a number of each sequence, which its random numbers belong to; the row when left out.

    Returns: [b] int64.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    sequence = torch.arange(len(logits), device=logits.device) if sequence is None else sequence
    u = uniform(stream_key(sampling.seed, "sample"), sequence * _LONGEST + position)
    if sampling.top_k == 0 and sampling.top_p == 1:
        return ops.draw(logits, u, sampling.temperature)
    return ops.draw(filtered(logits, sampling), u)
