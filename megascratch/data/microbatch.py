"""The value that the engine consumes: one microbatch of one data-parallel rank."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Microbatch:
    """`b` samples of `s` tokens.

    Attributes:
        tokens: inputs, [b, s] int64.
        labels: the token that follows each input, [b, s] int64.
        loss_mask: 1 where the loss counts, [b, s] float32.
        position_ids: of the inputs, [b, s] int64.
        documents: number of each input's document within its sample, [b, s] int64; one begins where positions restart.
        sample_ids: index of each sample in the whole run, [b] int64; the sample log and layout-independent dropout
            depend on it.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    documents: Tensor
    sample_ids: Tensor

    def to(self, device: torch.device | str) -> "Microbatch":
        """Return the microbatch on a device."""
        return Microbatch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

    def ahead(self, n_tokens: int) -> "Microbatch":
        """Return what each place is to read and to predict so many tokens later; beyond its document it has no loss."""

        def shifted(x: Tensor) -> Tensor:
            out = torch.zeros_like(x)
            out[:, : x.shape[1] - n_tokens] = x[:, n_tokens:]
            return out

        # Places past the end get document 0, but their loss mask is 0 already.
        same_document = shifted(self.documents) == self.documents
        return replace(
            self,
            tokens=shifted(self.tokens),
            labels=shifted(self.labels),
            loss_mask=shifted(self.loss_mask) * same_document,
        )

    def part(self, index: Tensor) -> "Microbatch":
        """Return the tokens at these places of every sequence, [b, len(index)]."""
        return replace(
            self,
            tokens=self.tokens[:, index],
            labels=self.labels[:, index],
            loss_mask=self.loss_mask[:, index],
            position_ids=self.position_ids[:, index],
            documents=self.documents[:, index],
        )
