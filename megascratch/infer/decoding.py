"""Generate token by token, keeping the keys and values of the tokens before.

Legend: `b` rows, `s` prompt tokens, `t` tokens of the cache, `v` vocabulary, `k` key/value heads, `d` head dimension.

    prompt  a b c     forward(a b c) → logits behind c → token x      the cache now holds a b c
                      forward(x)     → logits behind x → token y      the cache now holds a b c x
                      forward(y)     → ...
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megascratch.config import ModelConfig
from megascratch.dist import comm
from megascratch.errors import ConfigError, Problem, TokenizerError
from megascratch.infer.sampling import Sampling, sample
from megascratch.nn import LayerCache, SequenceInfo, Stage

_PROMPT_CHUNK = 512  # prompt tokens a forward pass: bounds the memory of [s, b, v] logits and [b, n, s, t] scores


def generate(
    stage: Stage,
    prompts: Tensor,
    sampling: Sampling,
    *,
    max_tokens: int,
    stop_id: int | None = None,
    n_ids: int | None = None,
) -> Iterator[Tensor]:
    """Continue prompts of equal length; the same on every rank of tp.

    Args:
        stage: the whole model, in evaluation mode; on every rank of its tp axis.
        prompts: [b, s] int64, the same on every rank of tp. For n samples of one prompt, expand it to n rows.
        sampling: how tokens are chosen.
        max_tokens: to generate at most; the model's `max_seq_length` ends a sequence too.
        stop_id: token after which a row is complete.
        n_ids: choose among ids below this only; the model's vocabulary when left out.

    Returns: an iterator of [b] int64, the next token of each row; of a complete row, `stop_id` again. It ends when all
        rows are complete.

    Raises: ConfigError, TokenizerError: before anything runs, if a prompt does not fit the model.
    """
    model = stage.model
    assert stage.is_first and stage.is_last and model.vocab_size is not None
    check_prompts(prompts, model, max_tokens)
    n_ids = min(n_ids or model.vocab_size, model.vocab_size)
    length = min(prompts.shape[1] + max_tokens, model.max_seq_length)
    return _tokens(stage, prompts.to(stage.placement.device), sampling, length, stop_id, n_ids)


def check_prompts(prompts: Tensor, model: ModelConfig, max_tokens: int) -> None:
    """Raise for prompts [b, s] that the model cannot continue by at least one token, and for `max_tokens` below 1."""
    s = prompts.shape[1]
    problems = []
    if max_tokens < 1:
        problems.append(Problem(f"max_tokens = {max_tokens}", "must be 1 or more"))
    if s < 1:
        problems.append(Problem("the prompt", "holds no token", "give at least one"))
    if s >= model.max_seq_length:
        rule = f"must leave room in the context of model.max_seq_length = {model.max_seq_length}"
        problems.append(Problem(f"a prompt of {s} tokens", rule, f"shorten it to {model.max_seq_length - 1} or less"))
    if problems:
        raise ConfigError(problems, "the request")
    assert model.vocab_size is not None
    outside = prompts[(prompts < 0) | (prompts >= model.vocab_size)]
    if len(outside):
        rule = f"must be 0 to {model.vocab_size - 1}, as model.vocab_size = {model.vocab_size}"
        raise TokenizerError(
            Problem(f"token id {int(outside[0])}", rule, "use the tokenizer that the model was trained with"),
            "the prompt",
        )


def _tokens(
    stage: Stage, prompts: Tensor, sampling: Sampling, length: int, stop_id: int | None, n_ids: int
) -> Iterator[Tensor]:
    caches = make_caches(stage, len(prompts), length)
    complete = torch.zeros(len(prompts), dtype=torch.bool, device=prompts.device)
    offset, tokens = 0, prompts
    while True:
        logits = next_logits(stage, tokens, offset, caches)[:, :n_ids]
        offset += tokens.shape[1]
        # All ranks hold the same logits, but not all sums on a GPU add in a fixed order: one rank decides.
        chosen = comm.broadcast(sample(logits, sampling, offset), stage.placement.tp)
        if stop_id is not None:
            chosen = chosen.masked_fill(complete, stop_id)
            complete |= chosen == stop_id
        yield chosen
        if offset + 1 >= length or bool(complete.all()):
            return
        tokens = chosen.unsqueeze(1)


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

    def room(shape: tuple[int, int]) -> Tensor:
        return torch.empty(length, batch, *shape, dtype=placement.dtype, device=placement.device)

    return [LayerCache(*map(room, shapes)) for _ in stage.layers]


@torch.no_grad()
def next_logits(stage: Stage, tokens: Tensor, offset: int, caches: Sequence[LayerCache]) -> Tensor:
    """Feed tokens [b, s] at positions offset …, and return the logits behind the last of them.

    Returns: [b, v], gathered over tp, with padding columns last. The caches are extended.
    """
    for start in range(0, tokens.shape[1], _PROMPT_CHUNK):
        part = tokens[:, start : start + _PROMPT_CHUNK]
        logits = stage(None, part, SequenceInfo(part.shape[1], offset=offset + start), caches)
    return comm.gather(logits[-1], stage.placement.tp, dim=-1)
