"""Multi-token prediction: modules behind the last layer that each look one token further ahead.

Legend: `s` sequence, `b` micro-batch, `h` hidden; activations [s, b, h], divided along s under sequence parallelism.

By hand, tokens a b c d e. The model reads a at the first place and predicts b. Module 0 has what the model made of a
(before its last norm), and the embedding of b; it predicts c. Module 1 has what module 0 made of it, and the embedding
of c; it predicts d:

    place 0     a ─ layers ─┬─ norm ─ head ─ b
                b ─ embed ──┴─ merge ─ layer ─┬─ norm ─ head ─ c
                c ─ embed ────────────────────┴─ merge ─ layer ─ norm ─ head ─ d

Embedding and head are the model's own. The modules serve training; generation does without them.

Source: DeepSeek-V3, arXiv:2412.19437, section 2.2.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megascratch.config import ModelConfig
from megascratch.nn.linear import ReplicatedLinear
from megascratch.nn.norm import make_norm
from megascratch.nn.placement import Placement


class Ahead(nn.Module):
    """One module: merges an embedding into what was made so far, and runs a layer on it.

    Args:
        model: resolved shape.
        placement: where parameters and tokens lie.
        layer: the decoder layer, of the model's own kind.
    """

    def __init__(self, model: ModelConfig, placement: Placement, layer: nn.Module) -> None:
        super().__init__()
        self.embed_norm = make_norm(model, placement)
        self.hidden_norm = make_norm(model, placement)
        self.merge = ReplicatedLinear(2 * model.hidden, model.hidden, placement, std=model.init_std)
        self.layer = layer
        self.norm = make_norm(model, placement)

    def forward(self, x: Tensor, embedded: Tensor, run: Callable[[nn.Module, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Look one token further ahead.

        Args:
            x: what was made so far, [s/tp or s, b, h], not normalised.
            embedded: the next token's embedding, like x.
            run: runs the layer on its input.

        Returns: what is handed on, and what the head reads, like x.
        """
        x = run(self.layer, self.merge(torch.cat((self.embed_norm(embedded), self.hidden_norm(x)), dim=-1)))
        return x, self.norm(x)
