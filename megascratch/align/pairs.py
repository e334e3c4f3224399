"""Tokens of a micro-batch seen as answers, and answers as pairs.

Documents of a row are numbered 0 … n − 1, and n may be 1: row after row they are one list of answers, in which those of
a pair are neighbours, chosen first. Rows that hold fewer documents leave gaps, which are taken out here.

Legend: `b` rows, `s` places, `n` documents of a row at most, `p` pairs or answers that are there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megascratch.align.preference_losses import Ratios
from megascratch.data.microbatch import Microbatch
from megascratch.engine import Outputs, Ratio


@dataclass(frozen=True)
class Answers:
    """What a model makes of the answers of a micro-batch, the same on every rank of cp.

    Attributes:
        values: a number for each place of the list, [b · n]; 0 where there is no document.
        present: whether there is one, [b · n] bool.
    """

    values: Tensor
    present: Tensor

    @property
    def singles(self) -> Tensor:
        """The answers one by one, [p]."""
        return self.values[self.present]

    @property
    def pairs(self) -> Ratios:
        """Chosen and rejected answers, [p] each."""
        present = self.present[0::2]
        return Ratios(self.values[0::2][present], self.values[1::2][present])

    def like(self, values: Tensor) -> "Answers":
        """Return other numbers of the same answers, from [b, n]."""
        return Answers(values.flatten().to(self.values), self.present)


def answers(outputs: Outputs, microbatch: Microbatch, of_tokens: Tensor) -> Answers:
    """Add what is known of each token, [b, s], up over the learned tokens of each document."""
    present = microbatch.of_samples["present"]
    masked = of_tokens * microbatch.loss_mask.to(of_tokens.dtype)
    sums = outputs.document_sums(masked, microbatch.documents, present.shape[1])
    return Answers(sums.flatten(), present.flatten() > 0)


def answer_logprobs(outputs: Outputs, microbatch: Microbatch) -> Tensor:
    """Return the log-probability of each document's learned tokens, summed: [b, n]; for `Engine.compute`."""
    found = answers(outputs, microbatch, outputs.logprobs(microbatch.labels, microbatch.loss_mask))
    return found.values.view_as(microbatch.of_samples["present"])


def is_chosen(microbatch: Microbatch) -> Tensor:
    """Return whether a token belongs to the first answer of a pair, [b, s] bool."""
    b, n = microbatch.of_samples["present"].shape
    row = torch.arange(b, device=microbatch.documents.device).unsqueeze(1)
    return (row * n + microbatch.documents) % 2 == 0


def is_text(microbatch: Microbatch) -> Tensor:
    """Return whether a place has a token to predict, a prompt's or an answer's, [b, s] bool: the rest is padding."""
    return microbatch.documents < microbatch.of_samples["present"].sum(1, keepdim=True)


def document_values(microbatch: Microbatch, values: Tensor) -> Tensor:
    """Give every place its document's value of [b, n]: [b, s]; padding has one of no meaning."""
    return values.gather(1, microbatch.documents.clamp(max=values.shape[1] - 1))


def over_tokens(values: Tensor, mask: Tensor) -> Ratio:
    """Return the mean of [b, s] over the tokens that a mask keeps."""
    return Ratio((values * mask).sum(), mask.sum())
