"""What is minimised: a function of the last stage's outputs that returns a sum and its weight.

    objective(outputs, microbatch) -> Loss(total, weight, metrics)

Only the engine divides, once, over all micro-batches and data-parallel ranks: a mean of means would weigh a short
sequence's tokens more than a long one's.

Legend: `s` sequence, `b` micro-batch, `v` vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from megascratch.data.microbatch import Microbatch
from megascratch.dist.mesh import Axis
from megascratch.nn import token_logprobs


@dataclass(frozen=True)
class Outputs:
    """What the last stage computed for a micro-batch.

    Attributes:
        logits: this rank's columns, [s, b, v/tp].
        vocab_size: logical v.
        tp: axis that the columns are divided over.
    """

    logits: Tensor
    vocab_size: int
    tp: Axis

    def logprobs(self, labels: Tensor) -> Tensor:
        """Return the log-probability of each label [b, s], as [b, s] in `acc_dtype`."""
        return token_logprobs(self.logits, labels.t(), self.vocab_size, self.tp).t()


@dataclass(frozen=True)
class Loss:
    """A sum over what counts, and how much counted.

    Attributes:
        total: scalar to differentiate: a sum, not a mean.
        weight: scalar that the engine divides by, after adding up all micro-batches of all ranks.
        metrics: further scalar sums, divided by the same weight.
    """

    total: Tensor
    weight: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


Objective = Callable[[Outputs, Microbatch], Loss]


def next_token(outputs: Outputs, microbatch: Microbatch) -> Loss:
    """Cross-entropy of the next token, in nats, over the tokens that the loss mask keeps."""
    logprobs = outputs.logprobs(microbatch.labels)
    mask = microbatch.loss_mask.to(logprobs.dtype)
    return Loss(total=-(logprobs * mask).sum(), weight=mask.sum())
