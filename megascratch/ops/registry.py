"""How an operator is made known to torch: schema, reference, fake version and autograd formula, in one place.

The reference is registered for every device; a compiled library that registers a kernel for CPU or CUDA overrides it
there. So the dispatcher, and no code of ours, picks what runs, and with no library the reference does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

NAMESPACE = "megascratch"


class Formula(NamedTuple):
    """An operator's autograd formula. The stable ABI has none in C++, so all backends share this one.

    `save(ctx, inputs, output)` keeps what the backward pass needs; `backward(ctx, *grads)` returns one gradient, or
    None, for each input.
    """

    save: Callable[..., None]
    backward: Callable[..., Any]


@dataclass(frozen=True)
class Operator:
    """One operator: what stands in the schema is the whole contract that every backend keeps."""

    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    formula: Formula | None = None

    @property
    def name(self) -> str:
        return self.schema.partition("(")[0]


def define(operator: Operator, library: torch.library.Library) -> None:
    """Register all that the operator is in a library's namespace."""
    name = f"{library.ns}::{operator.name}"
    library.define(operator.schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(operator.name, operator.reference, "CompositeExplicitAutograd")
    torch.library.register_fake(name, operator.fake, lib=library)
    if operator.formula is not None:
        torch.library.register_autograd(
            name, operator.formula.backward, setup_context=operator.formula.save, lib=library
        )


def acc_dtype(x: Tensor) -> torch.dtype:
    """The type to accumulate x in: float32 for half precision, otherwise x's own, so that float64 stays float64."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
