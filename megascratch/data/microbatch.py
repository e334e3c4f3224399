"""The value that the engine consumes: one microbatch of one data-parallel rank."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Microbatch:
    """`b` samples of `s` tokens, and what an objective has to know of them besides.

    Attributes:
        tokens: inputs, [b, s] int64.
        labels: the token that follows each input, [b, s] int64.
        loss_mask: 1 where the loss counts, [b, s] float32.
        position_ids: of the inputs, [b, s] int64.
        documents: number of each input's document within its sample, [b, s] int64; one begins where positions restart.
        sample_ids: index of each sample in the whole run, [b] int64; the sample log and layout-independent dropout
            depend on it.
        of_tokens: by name, what is known of each label (its advantage, its log-probability when it was sampled),
            [b, s]; divided over cp as the tokens are.
        of_samples: by name, what is known of each sample, or of each of its n documents (a margin, a reference's
            log-probability), [b, ...]; whole on every rank.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    position_ids: Tensor
    documents: Tensor
    sample_ids: Tensor
    of_tokens: Mapping[str, Tensor] = field(default_factory=dict)
    of_samples: Mapping[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> "Microbatch":
        """Return the microbatch on a device."""
        return self.apply(lambda x: x.to(device, non_blocking=True))

    def apply(self, function: Callable[[Tensor], Tensor]) -> "Microbatch":
        """Return the microbatch with a function applied to every tensor."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in values.items():
            is_tensor = isinstance(value, Tensor)
            values[name] = function(value) if is_tensor else {key: function(x) for key, x in value.items()}
        return Microbatch(**values)

    def tensors(self) -> list[Tensor]:
        """Return every tensor, in an order that microbatches with equal names share."""
        values = [getattr(self, f.name) for f in fields(self)]
        return [x for value in values for x in ([value] if isinstance(value, Tensor) else value.values())]

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
            of_tokens={name: x[:, index] for name, x in self.of_tokens.items()},
        )
