"""The completions of one rollout as rows of tokens, the micro-batches that they make, and what engines say of them.

    question   2 + 2 =      completion   4 ⏎      at a place stands what concerns the *next* token:
    tokens     2  +  2  =  4  ⏎  0  0
    mask       0  0  0  1  1  0  0  0
    sampled    0  0  0 −.7 −.1 0  0  0

Legend: `n` completions of a rollout, `s` tokens of a row, prompt included; `b` rows of a micro-batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megascratch.config import RolloutConfig
from megascratch.data.microbatch import Microbatch
from megascratch.data.sampler import microbatch_ids
from megascratch.dist import comm
from megascratch.engine import Engine, Outputs
from megascratch.infer import Completion

# Rows are cut behind their longest completion, to a multiple that keeps products of matrices whole.
_LENGTH_STEP = 32


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


def microbatches_of(
    engine: Engine, rollout: Rollout, rows: Tensor, first_sample: int, of_tokens: Mapping[str, Tensor]
) -> list[Microbatch]:
    """Return this data-parallel rank's micro-batches of the given rows.

    Args:
        engine: whose layout divides them.
        rollout: their rows.
        rows: [global_batch] int64.
        first_sample: number of row 0 in the run.
        of_tokens: of these rows, [global_batch, s] each.
    """
    train, dp = engine.config.train, engine.mesh.dp
    s = _row_length(engine, int(rollout.lengths[rows].max()))
    tokens, mask = rollout.tokens[rows], rollout.mask[rows]
    labels = torch.cat((tokens[:, 1:], torch.zeros_like(tokens[:, :1])), dim=1)
    microbatches = []
    for ids in microbatch_ids(0, len(rows), train.micro_batch, dp.rank, dp.size):
        part = slice(ids.start, ids.stop)
        microbatches.append(
            Microbatch(
                tokens=tokens[part, :s],
                labels=labels[part, :s],
                loss_mask=mask[part, :s],
                position_ids=torch.arange(s).expand(len(ids), s),
                documents=torch.zeros(len(ids), s, dtype=torch.int64),
                sample_ids=rows[part] + first_sample,
                of_tokens={name: x[part, :s] for name, x in of_tokens.items()},
            )
        )
    return microbatches


def of_each_token(engine: Engine, rollout: Rollout, function: Callable[[Outputs, Tensor], Tensor]) -> Tensor:
    """Return what a function makes of an engine's outputs and the labels, for every row, [n, s] float64 on the CPU.

    Args:
        engine: the policy, or a model beside it on the same layout.
        rollout: its rows.
        function: gives [b, s] of this rank's tokens.
    """
    train, dp, n = engine.config.train, engine.mesh.dp, len(rollout.tokens)
    results = torch.zeros(rollout.tokens.shape, dtype=torch.float64)
    for rows in torch.arange(n).split(train.global_batch):
        microbatches = microbatches_of(engine, rollout, rows, 0, {})
        found = engine.compute(microbatches, lambda o, m: o.whole_sequences(function(o, m.labels)))
        for microbatch, values in zip(microbatches, found):
            results[microbatch.sample_ids, : values.shape[1]] = values.double().cpu()
    return comm.sum_over(results.to(engine.mesh.device), dp).cpu()


def _row_length(engine: Engine, longest: int) -> int:
    """Return how long rows are that hold so many tokens: as little as serves the layout, and any layout alike."""
    parallel, most = engine.config.parallel, engine.config.data.seq_length
    sequence_parallel = parallel.tp if parallel.sequence_parallel else 1
    divides = _LENGTH_STEP % (2 * parallel.cp * sequence_parallel) == 0
    if not divides or engine.config.train.cuda_graph or engine.config.model.moe is not None:
        return most  # experts' capacity is a share of the row
    return min(most, -(-longest // _LENGTH_STEP) * _LENGTH_STEP)
