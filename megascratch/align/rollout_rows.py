"""The completions of a rollout laid into rows: the micro-batches that they make, and what engines say of their tokens.

Unpacked, each completion has a row, behind its prompt. Packed, several share one as conversations do (`rows.packed`):
positions restart, and none attends to another. By hand, completions of 3, 4 and 5 tokens, prompts included, rows of at
most 8 places, `.` padding:

    unpacked   a a a . .              packed   c c c c c a a a
               b b b b .                       0 1 2 3 4 0 1 2     positions
               c c c c c                       b b b b . . . .

Rows are as short as so many of them can be. Packed, there are as many as the layout shares out evenly, the last of
which may be empty. Which completions are together matters to nothing: each token's weight in the loss is known before.

Legend: `r` rows of a step, `n` completions of a rollout, `s` tokens; `b` rows of a micro-batch.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megascratch.align.policy_losses import Aggregation, token_weights
from megascratch.align.rollout import Rollout
from megascratch.align.rows import Bin, packed
from megascratch.data.microbatch import Microbatch
from megascratch.data.sampler import microbatch_ids
from megascratch.dist import comm
from megascratch.engine import Engine, Measure

# Rows are as long as their longest needs, to a multiple that keeps products of matrices whole.
_LENGTH_STEP = 32


def microbatches_of(
    engine: Engine, rollout: Rollout, members: Tensor, first_sample: int, of_tokens: Mapping[str, Tensor]
) -> list[Microbatch]:
    """Return this data-parallel rank's micro-batches of the given completions.

    Args:
        engine: whose layout divides them.
        rollout: theirs.
        members: which ones, [global_batch] int64.
        first_sample: number of completion 0 in the run.
        of_tokens: of these completions, [global_batch, s] each.

    `of_samples` has, [b, documents] each: `present`, 1 where there is a completion, and `answer`, its number.
    """
    bins, s = _rows(engine, rollout.lengths[members].tolist())
    r, counts = len(bins), torch.tensor([len(inside) for inside in bins])
    inside = torch.tensor([member for one in bins for member in one])
    row, first = torch.arange(r).repeat_interleave(counts), counts.cumsum(0) - counts
    document, lengths = torch.arange(len(inside)) - first[row], rollout.lengths[members[inside]]
    before = lengths.cumsum(0) - lengths
    start = before - before[first[row]]
    of = torch.arange(len(inside)).repeat_interleave(lengths)  # of each token, which of `inside` it belongs to
    position = torch.arange(len(of)) - before[of]
    place = row[of], start[of] + position
    # Padding goes on with the last completion of its row.
    last = torch.zeros(r, dtype=torch.int64).scatter_reduce(0, row, start, "amax")
    positions = torch.arange(s) - last.unsqueeze(1)
    documents = (counts - 1).clamp(min=0).unsqueeze(1).repeat(1, s)
    source, filled = torch.zeros(r, s, dtype=torch.int64), torch.zeros(r, s, dtype=torch.bool)
    source[place], positions[place], documents[place], filled[place] = inside[of], position, document[of], True
    present, answer = torch.zeros(r, int(counts.max())), torch.zeros(r, int(counts.max()), dtype=torch.int64)
    present[row, document], answer[row, document] = 1.0, members[inside]

    def laid(x: Tensor) -> Tensor:
        return x[source, positions].masked_fill(~filled, 0)

    tokens = rollout.tokens[members]
    labels = torch.cat((tokens[:, 1:], torch.zeros_like(tokens[:, :1])), dim=1)
    whole = Microbatch(
        tokens=laid(tokens),
        labels=laid(labels),
        loss_mask=laid(rollout.mask[members]),
        position_ids=positions,
        documents=documents,
        sample_ids=answer[:, 0] + first_sample,
        of_tokens={name: laid(x) for name, x in of_tokens.items()},
        of_samples={"present": present, "answer": answer},
    )
    dp, size = engine.mesh.dp, engine.config.train.micro_batch
    parts = [slice(ids.start, ids.stop) for ids in microbatch_ids(0, r, size, dp.rank, dp.size)]
    return [whole.apply(lambda x, part=part: x[part]) for part in parts]  # type: ignore[misc]


def step_microbatches(
    engine: Engine, rollout: Rollout, members: Tensor, aggregation: Aggregation, of_tokens: Mapping[str, Tensor]
) -> list[Microbatch]:
    """Return this data-parallel rank's micro-batches of a step, in which each token has its weight.

    Args:
        engine, rollout, members: as for `microbatches_of`.
        aggregation: of the tokens' losses.
        of_tokens: of all completions of the rollout, [n, s] each.
    """
    train, config = engine.config.train, engine.config.rollout
    assert config is not None
    weights = token_weights(
        rollout.mask[members], aggregation, max_tokens=config.max_tokens, micro_batch=train.micro_batch
    )
    first_sample = rollout.index * config.n_completions * config.epochs
    chosen = {"weights": weights, **{name: x[members] for name, x in of_tokens.items()}}
    return microbatches_of(engine, rollout, members, first_sample, chosen)


def of_each_token(engine: Engine, rollout: Rollout, function: Measure) -> Tensor:
    """Return what a function makes of an engine's outputs and a micro-batch, for every completion, [n, s] float64.

    Args:
        engine: the policy, or a model beside it on the same layout.
        rollout: its completions.
        function: gives [b, s] of this rank's tokens.

    Returns: on the CPU, 0 behind the completions.
    """
    microbatches: list[Microbatch] = []
    found: list[Tensor] = []
    for members in torch.arange(len(rollout.tokens)).split(engine.config.train.global_batch):
        batch = microbatches_of(engine, rollout, members, 0, {})
        microbatches += batch
        found += engine.compute(batch, lambda o, m: o.whole_sequences(function(o, m)))
    return by_completion(engine, rollout, microbatches, found)


def by_completion(
    engine: Engine, rollout: Rollout, microbatches: Sequence[Microbatch], found: Sequence[Tensor]
) -> Tensor:
    """Put what was found of a rollout's micro-batches, [b, s] each, where its completions have it, [n, s] float64.

    Every rank gives what it has of its data-parallel part. Returns: on the CPU, 0 behind the completions.
    """
    results = torch.zeros(rollout.tokens.shape, dtype=torch.float64)
    for microbatch, values in zip(microbatches, found, strict=True):
        completion = microbatch.of_samples["answer"].gather(1, microbatch.documents)
        there = microbatch.of_samples["present"].gather(1, microbatch.documents) > 0
        there &= microbatch.position_ids < rollout.lengths[completion]
        results[completion[there], microbatch.position_ids[there]] = values.double().cpu()[there]
    return comm.sum_over(results.to(engine.mesh.device), engine.mesh.dp).cpu()


def _rows(engine: Engine, lengths: Sequence[int]) -> tuple[list[Bin], int]:
    """Return which completions of these lengths each row holds, and how long the rows are."""
    config, longest = engine.config, max(lengths)
    most, shortest = config.data.seq_length, _row_length(engine, longest)
    if not config.data.reset_attention_mask:
        return [[member] for member in range(len(lengths))], shortest
    # Whole rounds of the pipeline; two of the dualpipes, into which micro-batches go from both ends.
    rounds = 2 if config.parallel.schedule in ("dualpipe", "dualpipe-v") else 1
    unit = config.train.micro_batch * engine.mesh.dp.size * engine.mesh.pp.size * rounds
    n_rows = -(-len(packed(lengths, most)) // unit) * unit
    lengths_tried = (*range(shortest, most, _LENGTH_STEP), most)
    s, bins = next((s, bins) for s in lengths_tried if len(bins := packed(lengths, s)) <= n_rows)
    return bins + [[] for _ in range(n_rows - len(bins))], s


def _row_length(engine: Engine, longest: int) -> int:
    """Return how long rows are that hold so many tokens: as little as serves the layout, and any layout alike."""
    parallel, most = engine.config.parallel, engine.config.data.seq_length
    sequence_parallel = parallel.tp if parallel.sequence_parallel else 1
    divides = _LENGTH_STEP % (2 * parallel.cp * sequence_parallel) == 0
    if not divides or engine.config.train.cuda_graph or engine.config.model.moe is not None:
        return most  # experts' capacity is a share of the row
    return min(most, -(-longest // _LENGTH_STEP) * _LENGTH_STEP)
