"""How much of a model works on one token: of its experts only those that a token uses."""

import math
from collections.abc import Mapping

from megascratch.config import ModelConfig
from megascratch.nn.transformer import parameter_specs


def active_numel(model: ModelConfig) -> Mapping[str, float]:
    """Return, by name, the elements of each matrix that a token is multiplied by: its multiply-adds a token.

    Embeddings are looked up, and norms and biases are no matrices. A head tied to the embedding is the embedding's
    second use, and stands under its name.
    """
    share = 1.0 if model.moe is None else model.moe.router_topk / model.moe.num_experts
    active = {
        spec.name: math.prod(spec.shape) * (share if ".experts." in spec.name else 1.0)
        for spec in parameter_specs(model)
        if len(spec.shape) >= 2 and spec.name not in ("embed.weight", "position.weight")
    }
    if model.head == "scalar":
        return active
    assert model.vocab_size is not None
    head = "embed.weight" if model.tie_embeddings else "head.weight"
    active[head] = float(model.vocab_size * model.hidden) * (1 + model.mtp_num_layers)  # each module predicts
    return active
