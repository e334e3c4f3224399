"""Generate token by token, keeping the keys and values of the tokens before. Prompts may differ in length.

Every sequence counts its positions from its own beginning, and its token at position i lies at place i of its cache.
By hand, prompts `a b c` and `d`, the first of which ends with its second token `y`:

    positions      0 1 2 3 4 5
    prompts        a b c           one pass, padded; the logits behind c and behind d are what counts
                   d - -
    then           . . . x         one pass a token: x is at position 3, v at position 1 and replaces the padding
                   . v
                   . . . . y       y completes the first sequence, which leaves the batch
                   . . w
                   . . . z

So what a sequence becomes does not depend on what shares the batch: not its positions, not its random numbers, which
belong to its own number (`sampling`), and its logits to rounding alone.

Legend: `b` sequences, `a` of them still under way, `s` prompt tokens, `t` tokens of the cache, `v` vocabulary,
`h` hidden, `k` key/value heads, `d` head dimension.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megascratch.config import ModelConfig
from megascratch.dist import comm
from megascratch.dist.mesh import Axis
from megascratch.errors import ConfigError, Problem, TokenizerError
from megascratch.infer.sampling import Sampling, sample
from megascratch.nn import LayerCache, SequenceInfo, Stage, token_logprobs

_PROMPT_CHUNK = 512  # prompt tokens a forward pass: bounds the memory of [b, n, s, t] scores

Prompt = Sequence[int] | Tensor
Ends = Callable[[int, list[int]], bool]
"""Given a sequence's row and its tokens, without the prompt: whether it is complete; the same on every rank of tp."""


@dataclass(frozen=True)
class Step:
    """The next token of every sequence that was not complete.

    Attributes:
        rows: [a] int64, which of the sequences.
        tokens: [a] int64.
        logprobs: [a], of the tokens, at the sampling's temperature (1 where that is 0), under the distribution over the
            whole vocabulary: what a trainer gives the same token, to rounding.
        stopped: [a] bool, whether the token is one that ends a sequence.
    """

    rows: Tensor
    tokens: Tensor
    logprobs: Tensor
    stopped: Tensor


@dataclass(frozen=True)
class Completion:
    """What a sequence became.

    Attributes:
        tokens: [n] int64, without the prompt; the token that ended it included.
        logprobs: [n], see `Step`.
        stopped: whether it ended by itself; otherwise it was truncated.
    """

    tokens: Tensor
    logprobs: Tensor
    stopped: bool


def generate(
    stage: Stage,
    prompts: Tensor,
    sampling: Sampling,
    *,
    max_tokens: int,
    stop_id: int | None = None,
    n_ids: int | None = None,
) -> Iterator[Tensor]:
    """Continue prompts of equal length, handing out tokens as they come; the same on every rank of tp.

    Args:
        stage, sampling, max_tokens, n_ids: as for `decode`.
        prompts: [b, s] int64.
        stop_id: token after which a row is complete.

    Returns: an iterator of [b] int64, the next token of each row; of a complete row, `stop_id` again. It ends when all
        rows are complete.

    Raises: ConfigError, TokenizerError: before anything runs, if a prompt does not fit the model.
    """
    stop_ids = () if stop_id is None else (stop_id,)
    steps = decode(stage, list(prompts), sampling, max_tokens=max_tokens, stop_ids=stop_ids, n_ids=n_ids)

    def tokens() -> Iterator[Tensor]:
        for step in steps:
            yield step.tokens.new_full((len(prompts),), -1 if stop_id is None else stop_id).index_copy(
                0, step.rows, step.tokens
            )

    return tokens()


def complete(
    stage: Stage,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    max_tokens: int,
    stop_ids: Sequence[int] = (),
    n_ids: int | None = None,
    samples: int = 1,
    sequences: Sequence[int] | None = None,
    ends: Ends | None = None,
) -> list[Completion]:
    """Continue prompts to their ends; the same on every rank of tp. Arguments and errors as for `decode`.

    Returns: on the CPU, `samples` completions of the first prompt, then those of the second, and so on.
    """
    options = {"max_tokens": max_tokens, "stop_ids": stop_ids, "n_ids": n_ids, "samples": samples, "ends": ends}
    steps = list(decode(stage, prompts, sampling, sequences=sequences, **options))  # type: ignore[arg-type]
    n_rows = len(prompts) * samples
    if not n_rows:
        return []
    rows, tokens, logprobs, stopped = (
        torch.cat([getattr(step, name) for step in steps]).cpu() for name in ("rows", "tokens", "logprobs", "stopped")
    )
    order = rows.argsort(stable=True)
    lengths = rows.bincount(minlength=n_rows).tolist()
    parts = zip(*(x[order].split(lengths) for x in (tokens, logprobs, stopped)))
    return [Completion(tokens, logprobs, bool(stopped[-1])) for tokens, logprobs, stopped in parts]


def decode(
    stage: Stage,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    max_tokens: int,
    stop_ids: Sequence[int] = (),
    n_ids: int | None = None,
    samples: int = 1,
    sequences: Sequence[int] | None = None,
    ends: Ends | None = None,
) -> Iterator[Step]:
    """Continue prompts of any lengths, a token of each at a time; the same on every rank of tp.

    Args:
        stage: the whole model, in evaluation mode; on every rank of its tp axis.
        prompts: the same on every rank of tp.
        sampling: how tokens are chosen.
        max_tokens: to generate at most; the model's `max_seq_length` ends a sequence too.
        stop_ids: tokens after which a sequence is complete.
        n_ids: choose among ids below this only; the model's vocabulary when left out.
        samples: sequences that continue each prompt; it is read once for all of them.
        sequences: a number of each sequence, below 2³¹, that its random numbers belong to; its row when left out.
        ends: what else completes a sequence, as a text that spans tokens.

    Returns: an iterator that ends when all sequences are complete. Row i continues prompt i // samples.

    Raises: ConfigError, TokenizerError: before anything runs, if a prompt does not fit the model.
    """
    model, device = stage.model, stage.placement.device
    assert stage.is_first and stage.is_last and model.vocab_size is not None
    given = [torch.as_tensor(prompt, dtype=torch.int64) for prompt in prompts]
    check_prompts(given, model, max_tokens)
    n_ids = min(n_ids or model.vocab_size, model.vocab_size)
    numbers = torch.arange(len(given) * samples) if sequences is None else torch.tensor(sequences, dtype=torch.int64)
    assert len(numbers) == len(given) * samples
    batch = _Batch(stage, sampling, torch.tensor(list(stop_ids), device=device), n_ids, ends)
    return batch.run(given, max_tokens, samples, numbers.to(device))


def check_prompts(prompts: Sequence[Tensor], model: ModelConfig, max_tokens: int) -> None:
    """Raise for prompts [s] that the model cannot continue by at least one token, and for `max_tokens` below 1."""
    problems = []
    if max_tokens < 1:
        problems.append(Problem(f"max_tokens = {max_tokens}", "must be 1 or more"))
    if not all(map(len, prompts)):
        problems.append(Problem("the prompt", "holds no token", "give at least one"))
    longest = max(map(len, prompts), default=0)
    if longest >= model.max_seq_length:
        rule = f"must leave room in the context of model.max_seq_length = {model.max_seq_length}"
        remedy = f"shorten it to {model.max_seq_length - 1} or less"
        problems.append(Problem(f"a prompt of {longest} tokens", rule, remedy))
    if problems:
        raise ConfigError(problems, "the request")
    assert model.vocab_size is not None
    for prompt in prompts:
        outside = prompt[(prompt < 0) | (prompt >= model.vocab_size)]
        if len(outside):
            rule = f"must be 0 to {model.vocab_size - 1}, as model.vocab_size = {model.vocab_size}"
            remedy = "use the tokenizer that the model was trained with"
            raise TokenizerError(Problem(f"token id {int(outside[0])}", rule, remedy), "the prompt")


class _Batch:
    """Sequences under way together."""

    def __init__(self, stage: Stage, sampling: Sampling, stop_ids: Tensor, n_ids: int, ends: Ends | None) -> None:
        self.stage, self.sampling, self.stop_ids, self.n_ids, self.ends = stage, sampling, stop_ids, n_ids, ends
        self.so_far: dict[int, list[int]] = defaultdict(list)  # tokens of each row, for `ends`

    def run(self, prompts: list[Tensor], max_tokens: int, samples: int, sequences: Tensor) -> Iterator[Step]:
        """Yield steps until all are complete; arguments as for `decode`, `sequences` [b]."""
        if not prompts:
            return
        device = sequences.device
        longest = max(map(len, prompts))
        room = min(longest + max_tokens, self.stage.model.max_seq_length)
        hidden, caches = read_prompts(self.stage, prompts)
        rows = torch.arange(len(sequences), device=device)
        caches = [cache.select(rows // samples, longest, room) for cache in caches]
        hidden = hidden[rows // samples]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)[rows // samples]
        limits = (lengths + max_tokens).clamp(max=self.stage.model.max_seq_length)
        under_way = torch.ones_like(rows, dtype=torch.bool)
        while True:
            tokens, logprobs = self._choose(hidden, lengths, sequences)
            stopped = torch.isin(tokens, self.stop_ids) | self._ended(rows, tokens)
            yield Step(rows[under_way], tokens[under_way], logprobs[under_way], stopped[under_way])
            lengths += under_way
            under_way = under_way & ~stopped & (lengths < limits)
            n_left = int(under_way.sum())
            if n_left == 0:
                return
            if 2 * n_left <= len(rows):  # so that copies of caches cost less than the passes without them
                kept = under_way.nonzero().flatten()
                caches = [cache.select(kept, longest, room) for cache in caches]
                values = (rows, sequences, tokens, lengths, limits, under_way)
                rows, sequences, tokens, lengths, limits, under_way = (x[kept] for x in values)
            longest = min(longest + 1, room)
            # A complete sequence that is still in the batch computes on in its last place; nobody looks at it.
            positions = (lengths - 1).unsqueeze(1)
            info = SequenceInfo(1, positions=positions, n_cached=longest)
            with torch.no_grad():
                hidden = self.stage.hidden(None, tokens.unsqueeze(1), info, caches)[-1]

    def _ended(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Ask `ends` about every sequence, [a] bool."""
        ended = torch.zeros_like(rows, dtype=torch.bool)
        if self.ends is None:
            return ended
        for i, (row, token) in enumerate(zip(rows.tolist(), tokens.tolist())):
            self.so_far[row].append(token)
            ended[i] = self.ends(row, self.so_far[row])
        return ended

    @torch.no_grad()
    def _choose(self, hidden: Tensor, lengths: Tensor, sequences: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the tokens at positions `lengths` [a] from hidden [a, h]: [a] int64, and their log-probabilities."""
        assert self.stage.model.vocab_size is not None
        tp, vocab_size = self.stage.placement.tp, self.stage.model.vocab_size
        own = self.stage.logits(hidden.unsqueeze(0))
        logits = comm.gather(own[0], tp, dim=-1)  # padding columns come last
        # All ranks hold the same logits, but not all sums on a GPU add in a fixed order: one rank decides.
        tokens = comm.broadcast(sample(logits[:, : self.n_ids], self.sampling, lengths, sequences), tp)
        scaled = logits if self.sampling.temperature in (0.0, 1.0) else logits / self.sampling.temperature
        return tokens, token_logprobs(scaled, tokens, vocab_size, Axis("tp"))


@torch.no_grad()
def read_prompts(stage: Stage, prompts: Sequence[Tensor]) -> tuple[Tensor, list[LayerCache]]:
    """Run prompts [s] of any lengths through the model.

    Returns: what the head reads behind the last token of each, [b, h]; and the caches, as long as the longest prompt.
    """
    device, longest = stage.placement.device, max(map(len, prompts))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = prompt
    tokens = tokens.to(device)
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
    caches = make_caches(stage, len(prompts), longest)
    behind = torch.empty(len(prompts), stage.model.hidden, dtype=stage.placement.dtype, device=device)
    for start in range(0, longest, _PROMPT_CHUNK):
        part = tokens[:, start : start + _PROMPT_CHUNK]
        hidden = stage.hidden(None, part, SequenceInfo(part.shape[1], offset=start), caches)
        here = ((last >= start) & (last < start + part.shape[1])).nonzero().flatten()
        behind[here] = hidden[last[here] - start, here]
    return behind, caches


def make_caches(stage: Stage, batch: int, length: int) -> list[LayerCache]:
    """Return room for the keys and values of `length` tokens of each row: a cache a layer, [t, b, k/tp, d] each.

    Latent attention caches its latent vector and rotated part instead, [t, b, 1, c] and [t, b, 1, r], on every rank.
    """
    model, placement = stage.model, stage.placement
    assert model.n_kv_heads is not None and model.head_dim is not None
    if (mla := model.mla) is not None:
        shapes = (1, mla.kv_lora_rank), (1, mla.qk_pos_emb_head_dim)
    else:
        shapes = ((model.n_kv_heads // placement.tp.size, model.head_dim),) * 2
    like = torch.empty(0, dtype=placement.dtype, device=placement.device)
    return [LayerCache.of(length, batch, shapes, like) for _ in stage.layers]
