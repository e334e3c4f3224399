"""Balance stages by cost: the head is a product as large as several layers, so the last stage should hold fewer.

Costs are multiply-adds a token. Llama-3 8B, s = 8192: a layer has 218 M in its weights and 34 M in causal attention,
the head 525 M, so the head weighs 2.1 layers: of 32 layers on 4 stages, 9 8 8 7 would still leave the last one the
longest, and 9 9 8 6 does not. The embedding is a look-up and weighs nothing.
"""

from megascratch.config import ModelConfig
from megascratch.nn.active import active_numel


def balanced_layers(model: ModelConfig, seq_length: int, n_stages: int) -> tuple[int, ...]:
    """Return how many layers each stage holds so that the most expensive stage is as cheap as can be.

    Args:
        model: resolved shape, vocabulary size included.
        seq_length: tokens a sequence; attention's cost depends on it.
        n_stages: at most n_layers + 2: only the first and the last stage may go without a layer.
    """
    assert model.vocab_size is not None
    per_layer = [0.0] * model.n_layers
    for name, numel in active_numel(model).items():
        part, _, rest = name.partition(".")
        if part == "layers":
            per_layer[int(rest.partition(".")[0])] += numel
    layer = sum(per_layer) / model.n_layers + model.seen_keys(seq_length) * model.n_heads * model.attended_dims
    head = (1 + model.mtp_num_layers) * model.hidden * model.vocab_size + model.mtp_num_layers * layer
    if n_stages == 1:
        return (model.n_layers,)
    counts = [0, *[1] * (n_stages - 2), 0]
    costs = [count * layer for count in counts]
    costs[-1] += head
    for _ in range(model.n_layers - sum(counts)):
        cheapest = min(range(n_stages), key=lambda stage: costs[stage])
        counts[cheapest] += 1
        costs[cheapest] += layer
    return tuple(counts)
