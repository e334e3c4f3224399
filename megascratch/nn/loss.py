"""Cross-entropy over logits that are divided along the vocabulary, never gathered, and never whole in training.

Legend: `s` sequence, `b` micro-batch, `c` tokens of a chunk, `h` hidden, `v` vocabulary; leading dimensions of any
number are `...`. Three small reductions replace the gather of the logits: the maximum, the sum of exponentials, and the
label's logit, one number a token each (Shoeybi et al. 2019, arXiv:1909.08053, section 3).

The logits are the largest tensor of a step: 32k tokens × 128k words are 8.6 GB in bf16, and their softmax in float32
twice that. So the head's product and the loss go through the tokens together, a chunk at a time (`linear_*`):

    chunk 0   x [c, h] ─ head ─ logits [c, v/tp] ─ log p(label) and its gradient ─ gradients of x and the head
    chunk 1   …                 in the same place of memory                        … added to those of chunk 0

The head's gradient sums over tokens, so each token's weight in the loss must be known when its chunk is at hand. Given
beforehand (`linear_cross_entropy`), the forward pass computes the gradients too and backward only scales them. Known
only from the incoming gradient (`linear_logprobs`), backward multiplies by the head once more.
Source: Hsu et al. 2024, arXiv:2410.10989, section 3.3.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megascratch import ops
from megascratch.dist import comm
from megascratch.dist.mesh import Axis
from megascratch.nn.weight_gradients import main_grad

# Enough rows for a product at full speed, few enough that 128k words take half a gigabyte in float32.
CHUNK_TOKENS = 1024
_FEW = 0.9  # tokens that count are put together if they are fewer than this share: it copies their inputs
_DESCRIBED_TOKENS = 64  # of which the probabilities exist at once


def _own_words(n_columns: int, vocab_size: int, tp: Axis) -> tuple[int, int]:
    """Return the word of this rank's first column, and how many columns are words: the last ranks may hold padding."""
    first = tp.rank * n_columns
    return first, min(max(vocab_size - first, 0), n_columns)


def _label_logprobs(logits: Tensor, labels: Tensor, vocab_size: int, tp: Axis) -> tuple[Tensor, Tensor, Tensor]:
    """Return log p(label) = logit[label] − log Σ exp(logit), log Σ exp(logit), which its gradient needs, and a hit.

    Args:
        logits: this rank's columns, [..., v/tp].
        labels: [...] int64.
        vocab_size: logical v.
        tp: tensor-parallel axis.

    Returns: [...] each, in `acc_dtype`, and bool for the hits: whether no word has a higher logit than the label.
    """
    own_peak, own_total, picked = ops.logit_statistics(logits, labels, *_own_words(logits.shape[-1], vocab_size, tp))
    peak = comm.max_over(own_peak, tp)
    log_total = comm.sum_over(own_total * (own_peak - peak).exp(), tp).log()
    own_logit = comm.sum_over(picked, tp)
    return own_logit - peak - log_total, peak + log_total, own_logit >= peak


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, vocab_size: int, tp: Axis) -> Tensor:
        logprobs, log_total, _ = _label_logprobs(logits, labels, vocab_size, tp)
        ctx.save_for_backward(logits, labels, log_total)
        ctx.words = _own_words(logits.shape[-1], vocab_size, tp)
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        logits, labels, log_total = ctx.saved_tensors
        return ops.logit_gradient(grad, logits, labels, log_total, *ctx.words), None, None, None


class Notes(NamedTuple):
    """What else the logits say of each token, [...] each and without gradient.

    Attributes:
        hits: whether no word is more likely than the label, bool.
        entropy: of the distribution over the next word, in nats.
        mean_logit: over the vocabulary.
    """

    hits: Tensor
    entropy: Tensor
    mean_logit: Tensor

    def apply(self, function: Callable[[Tensor], Tensor]) -> "Notes":
        """Return them with a function applied to each."""
        return Notes(*map(function, self))


class _Chunks(NamedTuple):
    """What going through the tokens gave: log-probabilities [t], notes; gradients of x [t, h] and weight [v/tp, h]."""

    logprobs: Tensor
    notes: Notes | None
    grad_x: Tensor | None
    grad_weight: Tensor | None


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Bound logits to ±softcap by softcap · tanh(logits / softcap) (Gemma 2, arXiv:2408.00118); None leaves them."""
    return logits if softcap is None else (logits / softcap).tanh() * softcap


def _describe(logits: Tensor, log_total: Tensor, n_words: int, vocab_size: int, tp: Axis) -> tuple[Tensor, Tensor]:
    """Return the entropy −Σ p log p of each token's distribution, and its mean logit; logits [c, v/tp] → [c] each."""
    sums = log_total.new_empty(2, len(logits))
    for start in range(0, len(logits), _DESCRIBED_TOKENS):
        rows = slice(start, start + _DESCRIBED_TOKENS)
        own = logits[rows, :n_words].to(log_total.dtype)
        logprobs = own - log_total[rows].unsqueeze(-1)
        sums[0, rows] = -logprobs.exp().mul_(logprobs).sum(-1)
        sums[1, rows] = own.sum(-1)
    entropy, total = comm.sum_over(sums, tp)
    return entropy, total / vocab_size


def _go_through(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    grad: Tensor | None,
    vocab_size: int,
    tp: Axis,
    softcap: float | None,
    describe: bool = False,
    learns: bool = True,
) -> _Chunks:
    """Multiply x [t, h] by the head [v/tp, h] in chunks, and, given the log-probabilities' gradient [t], go back.

    A head that does not learn, as beside adapters, gets no gradient: a third of the work, and the largest tensor.
    """
    dtype = ops.acc_dtype(x)
    logprobs, entropy, mean_logit = (x.new_empty(labels.shape, dtype=dtype) for _ in range(3))
    hits = x.new_empty(labels.shape, dtype=torch.bool)
    grad_x = None if grad is None else torch.empty_like(x)
    # Chunks of half precision would lose their sum's last bits with every addition.
    grad_weight = weight.new_empty(weight.shape, dtype=dtype) if grad is not None and learns else None
    words = _own_words(len(weight), vocab_size, tp)
    place = x.new_empty(min(len(x), CHUNK_TOKENS), len(weight))
    for start in range(0, len(x), CHUNK_TOKENS):
        chunk = slice(start, start + CHUNK_TOKENS)
        product = place[: len(x[chunk])]
        ops.matmul_into(product, x[chunk], weight.t(), add=False)
        logits = capped(product, softcap)
        slope = None if softcap is None or grad is None else 1 - (logits / softcap).square()
        logprobs[chunk], log_total, hits[chunk] = _label_logprobs(logits, labels[chunk], vocab_size, tp)
        if describe:
            entropy[chunk], mean_logit[chunk] = _describe(logits, log_total, words[1], vocab_size, tp)
        if grad is None or grad_x is None:
            continue
        grad_logits = ops.logit_gradient(grad[chunk], logits, labels[chunk], log_total, *words, in_place=True)
        if slope is not None:
            grad_logits *= slope
        ops.matmul_into(grad_x[chunk], grad_logits, weight, add=False)
        if grad_weight is not None:
            ops.matmul_into(grad_weight, grad_logits.t(), x[chunk], add=start > 0)
    return _Chunks(logprobs, Notes(hits, entropy, mean_logit) if describe else None, grad_x, grad_weight)


def _returned(ctx: Any, value: Tensor, notes: Notes | None) -> tuple[Tensor | None, ...]:
    """Return a function's value, and behind it the notes, if there are any, which have no gradient."""
    if notes is None:
        return value, None, None, None
    ctx.mark_non_differentiable(*notes)
    return value, *notes


class _LinearCrossEntropy(torch.autograd.Function):
    """Σ −w · log p(label); the gradients wait for the incoming one, a scalar, to be scaled by it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        weights: Tensor,
        vocab_size: int,
        tp: Axis,
        softcap: float | None,
        describe: bool,
    ) -> tuple[Tensor | None, ...]:
        weights = weights.to(ops.acc_dtype(x))
        learns = ctx.needs_input_grad[1]
        grad = -weights if ctx.needs_input_grad[0] or learns else None
        done = _go_through(x, weight, labels, grad, vocab_size, tp, softcap, describe, learns)
        ctx.save_for_backward(done.grad_x, done.grad_weight)
        ctx.weight = weight
        return _returned(ctx, -(done.logprobs * weights).sum(), done.notes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        (grad_x, grad_weight), total = ctx.saved_tensors, main_grad(ctx.weight)
        if grad_weight is None:
            return grad_x * grad, None, None, None, None, None, None, None
        if total is not None:
            # A few rows at a time: of a sum in another dtype, torch would copy the whole, the largest tensor here.
            for rows, made in zip(total.split(CHUNK_TOKENS), grad_weight.split(CHUNK_TOKENS)):
                rows.addcmul_(made, grad)
            return grad_x * grad, None, None, None, None, None, None, None
        # Rounded as it is scaled, for the same reason.
        scaled = torch.mul(grad_weight, grad, out=torch.empty_like(ctx.weight))
        return grad_x * grad, scaled, None, None, None, None, None, None


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        vocab_size: int,
        tp: Axis,
        softcap: float | None,
        describe: bool,
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(x, weight, labels)
        ctx.others = vocab_size, tp, softcap
        done = _go_through(x, weight, labels, None, vocab_size, tp, softcap, describe)
        return _returned(ctx, done.logprobs, done.notes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        (x, weight, labels), (vocab_size, tp, softcap) = ctx.saved_tensors, ctx.others
        done = _go_through(x, weight, labels, grad, vocab_size, tp, softcap, learns=ctx.needs_input_grad[1])
        grad_weight = None if done.grad_weight is None else done.grad_weight.to(weight.dtype)
        return done.grad_x, grad_weight, None, None, None, None, None


def token_logprobs(logits: Tensor, labels: Tensor, vocab_size: int, tp: Axis) -> Tensor:
    """Return the log-probability, in nats, of each label.

    Args:
        logits: this rank's columns, [s, b, v/tp], padding columns included.
        labels: [s, b], int64, 0 ≤ label < vocab_size; any other value must be masked by the caller.
        vocab_size: logical v.
        tp: tensor-parallel axis.

    Returns: [s, b] in `acc_dtype`, the same on every rank of tp.
    """
    return _TokenLogprobs.apply(logits, labels, vocab_size, tp)


def _counting(weights: Tensor | None) -> Tensor | None:
    """Return the places of the tokens whose weight [t] is not 0, or None where nearly all or none are such.

    None on a GPU too, which would have to wait for their number.
    """
    if weights is None or weights.device.type != "cpu":
        return None
    places = weights.nonzero().flatten()
    return places if 0 < len(places) < _FEW * len(weights) else None


def _spread(values: Tensor, places: Tensor | None, shape: torch.Size) -> Tensor:
    """Put values of tokens at their places among those of a shape, the others being 0."""
    if places is not None:
        values = values.new_zeros(shape.numel()).index_copy(0, places, values)
    return values.view(shape)


def linear_logprobs(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    vocab_size: int,
    tp: Axis,
    softcap: float | None = None,
    describe: bool = False,
    counts: Tensor | None = None,
) -> tuple[Tensor, Notes | None]:
    """Return the log-probability of each label under the head's logits x · weightᵀ, without holding them.

    Args:
        x: the head's input, [s, b, h], the same on every rank of tp; its gradient is this rank's part of a sum.
        weight: this rank's rows of the head, [v/tp, h].
        labels, vocab_size, tp: as in `token_logprobs`.
        softcap: of the logits, or None.
        describe: whether to note what else the logits say.
        counts: 0 where nobody looks at the result, [s, b], the same on every rank of tp; None: everywhere.

    Returns: [s, b] in `acc_dtype`, the same on every rank of tp; and the notes, [s, b] each. Where nothing counts, they
        may be 0: where a prompt is a third of the tokens, the head has a third less to do.
    """
    places = _counting(None if counts is None else counts.flatten())
    flat = x.flatten(0, 1), labels.flatten()
    own_x, own_labels = flat if places is None else (t.index_select(0, places) for t in flat)
    logprobs, *noted = _LinearLogprobs.apply(own_x, weight, own_labels, vocab_size, tp, softcap, describe)
    notes = Notes(*noted).apply(lambda n: _spread(n, places, labels.shape)) if describe else None
    return _spread(logprobs, places, labels.shape), notes


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor,
    vocab_size: int,
    tp: Axis,
    softcap: float | None = None,
    describe: bool = False,
) -> tuple[Tensor, Notes | None]:
    """Return Σ −weights · log p(label), a scalar in `acc_dtype`: one product with the head less than `linear_logprobs`.

    Args:
        x, weight, labels, vocab_size, tp, softcap, describe: as in `linear_logprobs`.
        weights: of each label in the sum, [s, b]; they get no gradient. Those that are 0 cost nothing.

    Returns: with it the notes, [s, b] each, which may be 0 where the weight is.
    """
    if not torch.is_grad_enabled():  # a Function cannot tell from within: it would compute the gradients
        logprobs, notes = linear_logprobs(x, weight, labels, vocab_size, tp, softcap, describe, weights)
        return -(logprobs * weights).sum(), notes
    places = _counting(weights.flatten())
    flat = x.flatten(0, 1), labels.flatten(), weights.flatten()
    own_x, own_labels, own_weights = flat if places is None else (t.index_select(0, places) for t in flat)
    whole = own_x, weight, own_labels, own_weights, vocab_size, tp, softcap, describe
    total, *noted = _LinearCrossEntropy.apply(*whole)
    return total, Notes(*noted).apply(lambda n: _spread(n, places, labels.shape)) if describe else None
