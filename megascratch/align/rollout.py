"""The completions of one rollout, as rows of tokens.

    question   2 + 2 =      completion   4 ⏎      at a place stands what concerns the *next* token:
    tokens     2  +  2  =  4  ⏎  0  0
    mask       0  0  0  1  1  0  0  0
    sampled    0  0  0 −.7 −.1 0  0  0

Legend: `n` completions of a rollout, `s` tokens of a row, prompt included.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megascratch.config import Config, RolloutConfig
from megascratch.infer import Completion


@dataclass(frozen=True)
class Question:
    """A prompt.

    Attributes:
        where: file and line that it came from.
        ids: [tokens] int64.
        text: as the reward sees it.
        record: as it stands in the file.
    """

    where: str
    ids: Tensor
    text: str
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Rollout:
    """Completions, one a row.

    Attributes:
        index: of the rollout in the run.
        questions: of each completion, [n].
        completions: [n].
        tokens: prompt and completion, [n, s] int64, 0 behind them.
        mask: 1 where the next token is one of the completion's, and counts, [n, s] float32.
        sampled: log-probability of the next token when it was chosen, 0 elsewhere, [n, s] float64.
        lengths: tokens of each row, [n] int64.
        rewards: NaN where there is none, [n] float64.
        of_tokens: what a method adds, by name, [n, s] each.
    """

    index: int
    questions: list[Question]
    completions: list[Completion]
    tokens: Tensor
    mask: Tensor
    sampled: Tensor
    lengths: Tensor
    rewards: Tensor
    of_tokens: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, index: int, questions: list[Question], completions: list[Completion], s: int) -> "Rollout":
        """Lay completions into rows of s tokens, without rewards."""
        n = len(completions)
        tokens, mask = torch.zeros(n, s, dtype=torch.int64), torch.zeros(n, s)
        sampled, lengths = torch.zeros(n, s, dtype=torch.float64), torch.zeros(n, dtype=torch.int64)
        for row, (question, completion) in enumerate(zip(questions, completions, strict=True)):
            first, end = len(question.ids), len(question.ids) + len(completion.tokens)
            tokens[row, :first], tokens[row, first:end], lengths[row] = question.ids, completion.tokens, end
            mask[row, first - 1 : end - 1] = 1.0
            sampled[row, first - 1 : end - 1] = completion.logprobs
        rewards = torch.full((n,), torch.nan, dtype=torch.float64)
        return cls(index, questions, completions, tokens, mask, sampled, lengths, rewards)

    def rewarded(self, rewards: Tensor, config: RolloutConfig) -> "Rollout":
        """Return it with rewards [n], less what an unfinished completion costs; some are not to be learned from."""
        stopped = torch.tensor([completion.stopped for completion in self.completions])
        rewards = rewards - (~stopped) * config.missing_end_penalty
        counts = ~rewards.isnan() & (stopped | (not config.mask_truncated))
        return replace(self, rewards=rewards, mask=self.mask * counts.unsqueeze(1))


def needs_old(config: Config) -> bool:
    """Return whether what the policy and the critic say before a rollout's first step must be computed by itself.

    Not where that step learns from all of the rollout: what they say in its own pass is what they said before, and is
    kept for the steps that follow. A recorded step computes the same every time, so it cannot be the first of several.
    """
    rollout, train = config.rollout, config.train
    assert rollout is not None
    return rollout.n_completions > train.global_batch or (train.cuda_graph and rollout.epochs > 1)
