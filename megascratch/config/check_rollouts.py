"""Rules of reinforcement learning: how rollouts divide into steps, and what each kind of score needs."""

from collections.abc import Iterator

from megascratch.config.rollouts import ScoreConfig
from megascratch.config.schema import Config
from megascratch.config.words import multiples_near
from megascratch.errors import Problem

# The key that a kind of score cannot do without.
_NEEDS = {"function": "function", "regex": "pattern", "model": "checkpoint"}


def rollouts(config: Config, _: int | None) -> Iterator[Problem]:
    """Yield the problems of [rollout], where there is one."""
    rollout, train = config.rollout, config.train
    if rollout is None:
        return
    n = rollout.n_completions
    if n % train.global_batch:
        yield Problem(
            f"rollout.prompts × samples = {n}",
            f"must divide by train.global_batch = {train.global_batch}: a step learns from so many completions",
            f"use {multiples_near(n, train.global_batch)}, or another global_batch",
        )
    elif train.steps % (per_rollout := rollout.steps(train.global_batch)):
        yield Problem(
            f"train.steps = {train.steps}",
            f"must divide by {per_rollout}, the steps of a rollout",
            f"use {multiples_near(train.steps, per_rollout)}",
        )
    if rollout.max_tokens > config.data.seq_length:
        yield Problem(
            f"rollout.max_tokens = {rollout.max_tokens}",
            f"must leave room for a prompt in data.seq_length = {config.data.seq_length}",
            "shorten completions, or raise data.seq_length",
        )
    if config.model.dropout > 0:
        yield Problem(
            f"model.dropout = {config.model.dropout}",
            "must be 0 with rollouts: a ratio between two policies would measure the dropout",
            "set model.dropout = 0; weights do not depend on it",
        )
    if config.chat.packing if config.chat is not None else config.data.reset_attention_mask:
        of_one_size = {"parallel.schedule_file": config.parallel.schedule_file, "train.cuda_graph": train.cuda_graph}
        for key, value in of_one_size.items():
            if value:
                rule = "is made for batches of one size, and packed rollouts have as many rows as they need"
                yield Problem(f"{key} = {str(value).lower()}", rule, "set chat.packing = false")
    if not rollout.scores:
        yield Problem("rollout.scores", "names no reward", "for example scores = [{kind = 'number'}]")
    for index, score in enumerate(rollout.scores):
        yield from _score(f"rollout.scores[{index}]", score)


def _score(key: str, score: ScoreConfig) -> Iterator[Problem]:
    for kind, needed in _NEEDS.items():
        given = getattr(score, needed) is not None
        if kind == score.kind and not given:
            yield Problem(f"{key}.kind = {kind}", f"needs {key}.{needed}", f"set {needed}")
        elif kind != score.kind and given:
            yield Problem(f"{key}.{needed}", f"goes with kind = {kind}, not {score.kind}", "leave one of them out")
