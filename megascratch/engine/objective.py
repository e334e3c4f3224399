"""What is minimised: a function of the last stage's outputs that returns a sum and its weight.

    objective(outputs, microbatch) -> Loss(total, weight, metrics)

Only the engine divides, once, over all micro-batches and data-parallel ranks: a mean of means would weigh a short
sequence's tokens more than a long one's.

Legend: `s` sequence, `b` micro-batch, `h` hidden, `v` vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from megascratch.data.microbatch import Microbatch
from megascratch.dist import comm
from megascratch.dist.mesh import Axis
from megascratch.nn import linear_cross_entropy, linear_logprobs, scores
from megascratch.nn.context import natural_order, token_index
from megascratch.nn.linear import column_linear
from megascratch.nn.loss import Notes, capped
from megascratch.ops import acc_dtype


@dataclass(frozen=True)
class Outputs:
    """What the last stage computed for a micro-batch. Only an objective that asks for the logits makes them exist.

    Attributes:
        hidden: the head's input, [s/tp, b, h] under sequence parallelism, else [s, b, h].
        head: this rank's rows of the projection onto the vocabulary, [v/tp, h]; a scalar head's row, [1, h].
        vocab_size: logical v.
        tp: axis that the vocabulary is divided over.
        cp: axis that the sequences are divided over: a tensor [b, s] has this rank's tokens of each.
        sequence_parallel: whether `hidden` is divided along s.
        ahead: what modules that look further ahead computed, with the tokens that they are to predict (`labels`); empty
            in evaluation.
        ahead_factor: of the mean of their losses.
        softcap: of the logits, or None.
    """

    hidden: Tensor
    head: Tensor
    vocab_size: int
    tp: Axis
    cp: Axis
    sequence_parallel: bool
    ahead: Sequence[tuple["Outputs", Microbatch]] = ()
    ahead_factor: float = 0.0
    softcap: float | None = None

    @cached_property
    def logits(self) -> Tensor:
        """This rank's columns, [s, b, v/tp], padding included."""
        return capped(column_linear(self.hidden, self.head, self.tp, self.sequence_parallel), self.softcap)

    def logprobs(self, labels: Tensor, counts: Tensor | None = None) -> Tensor:
        """Return the log-probability of each label [b, s], as [b, s] in `acc_dtype`.

        Args:
            labels: [b, s] int64.
            counts: 0 where nobody looks at the result, [b, s], which may then be 0: it spares work. None: everywhere.
        """
        return self._logprobs(labels, counts, describe=False)[0]

    def described_logprobs(self, labels: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Notes]:
        """Return `logprobs`, and what else the logits say of each token, [b, s] each."""
        logprobs, notes = self._logprobs(labels, counts, describe=True)
        assert notes is not None
        return logprobs, notes.apply(torch.t)

    def _logprobs(self, labels: Tensor, counts: Tensor | None, describe: bool) -> tuple[Tensor, Notes | None]:
        whole, counts = self._whole(), None if counts is None else counts.t()
        head = self.head, labels.t(), self.vocab_size, self.tp, self.softcap
        logprobs, notes = linear_logprobs(whole, *head, describe, counts)
        return logprobs.t(), notes

    def cross_entropy(self, labels: Tensor, weights: Tensor) -> Tensor:
        """Return Σ −weights · log p(label), a scalar: `logprobs` for a loss whose weights [b, s] are known; cheaper."""
        return self._cross_entropy(labels, weights, describe=False)[0]

    def described_cross_entropy(self, labels: Tensor, weights: Tensor) -> tuple[Tensor, Notes]:
        """Return `cross_entropy`, and what else the logits say of each token that weighs something, [b, s] each."""
        total, notes = self._cross_entropy(labels, weights, describe=True)
        assert notes is not None
        return total, notes.apply(torch.t)

    def _cross_entropy(self, labels: Tensor, weights: Tensor, describe: bool) -> tuple[Tensor, Notes | None]:
        whole, labels, weights = self._whole(), labels.t(), weights.t()
        return linear_cross_entropy(whole, self.head, labels, weights, self.vocab_size, self.tp, self.softcap, describe)

    @cached_property
    def scores(self) -> Tensor:
        """What a scalar head makes of each token, [b, s] in `acc_dtype`, the same on every rank of tp."""
        own = scores(self.hidden, self.head).squeeze(-1)
        return (comm.gather(own, self.tp) if self.sequence_parallel else own).t()

    @property
    def share(self) -> float:
        """What this rank counts of a sum over whole sequences, which every rank of cp computes alike."""
        return 1.0 / self.cp.size

    def document_sums(self, values: Tensor, documents: Tensor, n_documents: int) -> Tensor:
        """Add up [b, s] over each document: [b, n_documents], the same on every rank of cp.

        Args:
            values: 0 where a token counts for nothing, as all of documents from `n_documents` on must.
            documents: [b, s] int64, from 0.
            n_documents: of each sample.

        What is made of the sums is computed on every rank of cp, so only its `share` belongs into a loss.
        """
        own = values.new_zeros(values.shape[0], n_documents)
        own = own.scatter_add(1, documents.clamp(max=n_documents - 1), values)
        return comm.copy(comm.all_reduce(own, self.cp), self.cp)

    def whole_sequences(self, values: Tensor) -> Tensor:
        """Put [b, s], which cp divides, together in the order of the tokens; without gradient."""
        if self.cp.size == 1:
            return values.detach()
        joined = comm.gather(values.detach().t(), self.cp)
        return joined[natural_order(len(joined), self.cp, joined.device)].t()

    def own_tokens(self, values: Tensor) -> Tensor:
        """Undo `whole_sequences`: of [b, s·cp], return the tokens that this rank of cp holds, [b, s]."""
        if self.cp.size == 1:
            return values
        return values[:, token_index(values.shape[1], self.cp, values.device)]

    def _whole(self) -> Tensor:
        """The head's input on every rank of tp, [s, b, h]; gradients are summed over the axis on the way back."""
        enter = comm.all_gather if self.sequence_parallel else comm.copy
        return enter(self.hidden, self.tp)


class Ratio(NamedTuple):
    """A metric's scalar sum, and the scalar that it is divided by once both are added up over the global batch."""

    total: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Loss:
    """A sum over what counts, and how much counted.

    Attributes:
        total: scalar to differentiate: a sum, not a mean.
        besides: scalar sum that is differentiated with `total`, and not reported as the loss.
        weight: scalar that the engine divides by, after adding up all micro-batches of all ranks.
        metrics: further scalar sums, divided by the same weight, or each with a weight of its own.
        of_tokens: by name, what it computed of this rank's tokens, [b, s], without gradient.
    """

    total: Tensor
    weight: Tensor
    metrics: Mapping[str, "Tensor | Ratio"] = field(default_factory=dict)
    besides: Tensor | None = None
    of_tokens: Mapping[str, Tensor] = field(default_factory=dict)


Objective = Callable[[Outputs, Microbatch], Loss]
Measure = Callable[[Outputs, Microbatch], Tensor]
"""What is to be known of a micro-batch: a tensor of one shape for all of them; see `Engine.compute`."""


def next_token(outputs: Outputs, microbatch: Microbatch) -> Loss:
    """Cross-entropy of the next token, in nats, over the tokens that the loss mask keeps.

    Besides it, that of tokens further ahead, where the model predicts them: the mean over its modules, times their
    factor. It counts by the same weight, although the last places of a sequence have nothing so far ahead of them.
    """
    dtype = acc_dtype(outputs.hidden)
    mask = microbatch.loss_mask.to(dtype)
    return with_ahead(Loss(total=outputs.cross_entropy(microbatch.labels, mask), weight=mask.sum()), outputs)


def with_ahead(loss: Loss, outputs: Outputs) -> Loss:
    """Put the loss of tokens further ahead, if the model predicts any, beside that of the next one."""
    if not outputs.ahead:
        return loss
    dtype = acc_dtype(outputs.hidden)
    losses = [further.cross_entropy(later.labels, later.loss_mask.to(dtype)) for further, later in outputs.ahead]
    mean = torch.stack(losses).mean()
    return replace(loss, besides=outputs.ahead_factor * mean, metrics={**loss.metrics, "mtp_loss": mean})
