"""Completions of one moment's policy, as a source of batches: generate, score, weigh, and learn a few times over.

    rollout i      prompts ─ complete (`generator`) ─ score (`rewards`) ─ what each token brought (`Learner`)
    steps          of `train.global_batch` completions, `epochs` times over; in the first epoch in order, then shuffled
    rollout i + 1  by the policy as it is then

By hand: 4 prompts of 2 samples, steps of 4 completions, 2 epochs: steps 1 and 2 learn from completions 0–3 and 4–7,
steps 3 and 4 from all of them in another order, step 5 begins with the next 4 prompts. So a run can be resumed after
steps 4, 8, …, and where it stands is the number of samples that it has consumed, as ever.

Everything random is a function of seeds and of the completion's number in the run: a rollout is the same on every
layout, to the rounding of its weights.

Legend: `n` completions of a rollout, `s` tokens of a row, prompt included.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from megascratch.align.completions_log import CompletionsLog
from megascratch.align.generator import Generator
from megascratch.align.policy_losses import Aggregation
from megascratch.align.rewards import Answered
from megascratch.align.rollout import Question, Rollout, needs_old
from megascratch.align.rollout_rows import by_completion, step_microbatches
from megascratch.align.scores import Scorer
from megascratch.data.microbatch import Microbatch
from megascratch.engine import Engine, StepReport
from megascratch.infer import Completion, Sampling


@dataclass(frozen=True)
class Language:
    """What a policy speaks.

    Attributes:
        decode: turns ids into text.
        stop_ids: end a completion.
        n_ids: how many ids there are; those beyond, which the model has for padding, are never chosen.
    """

    decode: Callable[[list[int]], str]
    stop_ids: Sequence[int]
    n_ids: int


class Learner(Protocol):
    """What a method makes of rollouts."""

    def prepare(self, rollout: Rollout) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return tensors [n, s] by name, `advantages` among them, and what there is to log. Every rank calls this."""
        ...

    def after_step(self, microbatches: list[Microbatch], report: StepReport) -> tuple[dict[str, float], bool]:
        """Learn what else there is to learn from a step's batch.

        Returns: what there is to log, and whether the policy has moved far enough from the rollout's.
        """
        ...


class Rollouts:
    """The source of a rank's batches. Every rank makes one, and calls its methods alike.

    Args:
        engine: the policy.
        questions: at least one.
        language: what it speaks.
        scorer: gives completions their rewards.
        learner: weighs tokens.
        aggregation: how they are added up.
        console: for what has no score.
        log: where completions are written.
    """

    def __init__(
        self,
        engine: Engine,
        questions: Sequence[Question],
        language: Language,
        scorer: Scorer,
        learner: Learner,
        aggregation: Aggregation,
        console: Console,
        log: CompletionsLog | None = None,
    ) -> None:
        assert engine.config.rollout is not None
        self.engine, self.config, self.train = engine, engine.config.rollout, engine.config.train
        self.questions, self.language, self.scorer, self.learner = questions, language, scorer, learner
        self.aggregation, self.console, self.log = aggregation, console, log
        self.generator = Generator(engine, self.config.tp)
        self.sampling = Sampling(self.config.temperature, self.config.top_k, self.config.top_p, self.train.seed)
        self._finds_old = self.config.epochs > 1 and not needs_old(engine.config)
        self._values: dict[str, Any] = {}
        self._rollout: Rollout | None = None  # that is learned from
        self._batch: list[Microbatch] = []
        self._moved_enough = False

    @property
    def keep(self) -> str | None:
        """What `observe` needs of each step: `Task.keep`."""
        return "logprobs" if self._finds_old else None

    def steps(self, consumed_samples: int, n_steps: int, prefetch: int = 2) -> Iterator[list[Microbatch]]:
        """Yield the micro-batches of steps, none once the policy has moved enough; `prefetch` would be too early."""
        first, rest = divmod(consumed_samples, self.config.n_completions * self.config.epochs)
        assert rest == 0, "a run is resumed between rollouts"
        per_rollout = self.config.steps(self.train.global_batch)
        for step in range(n_steps):
            index, turn = divmod(step, per_rollout)
            if turn == 0:
                self._rollout = rollout = self.roll_out(first + index)
                order = self._order(rollout)
                self._moved_enough = False
            rows = order[turn * self.train.global_batch : (turn + 1) * self.train.global_batch]
            self._batch = []
            if not self._moved_enough and rollout.mask[rows].any():
                self._batch = step_microbatches(self.engine, rollout, rows, self.aggregation, rollout.of_tokens)
            yield self._batch

    def observe(self, report: StepReport) -> dict[str, Any]:
        """Learn what else there is to learn from a step, and return what there is to log of it and of its rollout."""
        values, self._values = self._values, {}
        if self._batch:
            assert self._rollout is not None
            if self._finds_old and "old" not in self._rollout.of_tokens:
                old = by_completion(self.engine, self._rollout, self._batch, report.kept)
                self._rollout.of_tokens["old"] = old * self._rollout.mask
            more, enough = self.learner.after_step(self._batch, report)
            values |= more
            self._moved_enough |= enough
        return values

    def roll_out(self, index: int) -> Rollout:
        """Generate and score the completions of a rollout by the policy as it is now."""
        start = time.perf_counter()
        samples = self.config.samples
        asked = [self.questions[i] for i in self._asked(index)]
        self.generator.sync()
        completions = self.generator.complete(
            [question.ids for question in asked],
            self.sampling,
            max_tokens=self.config.max_tokens,
            stop_ids=self.language.stop_ids,
            n_ids=self.language.n_ids,
            samples=samples,
            first_sequence=index * self.config.n_completions,
            batch=self.config.batch,
        )
        generated_s = time.perf_counter() - start
        questions = [question for question in asked for _ in range(samples)]
        texts = [self.language.decode(self._said(completion)) for completion in completions]
        answers = [Answered(q.text, text, q.record) for q, text in zip(questions, texts)]
        rollout = Rollout.of(index, questions, completions, self.engine.config.data.seq_length)
        scores = self.scorer(answers, rollout)
        rollout = rollout.rewarded(scores.total, self.config)
        scores.report(rollout.questions, index * self.config.n_completions, self.console)
        tensors, values = self.learner.prepare(rollout)
        rollout.of_tokens.update({"sampled": rollout.sampled, **tensors})
        n_tokens = sum(len(completion.tokens) for completion in completions)
        speed = {"rollout/tokens_per_s": n_tokens / generated_s, "rollout/s": time.perf_counter() - start}
        self._values = {**speed, **_lengths(completions), **scores.metrics(), **values}
        if self.log is not None:
            self.log.write(self.engine.step, rollout, texts, scores, rollout.of_tokens["advantages"])
        return rollout

    def _asked(self, index: int) -> list[int]:
        """Return the questions of a rollout: all of them in a new order, again and again."""
        asked = []
        for number in range(index * self.config.prompts, (index + 1) * self.config.prompts):
            epoch, place = divmod(number, len(self.questions))
            asked.append(int(_permutation(len(self.questions), self.train.seed, epoch)[place]))
        return asked

    def _order(self, rollout: Rollout) -> Tensor:
        """Return the rows in the order in which they are learned from, [epochs · n] int64."""
        n = self.config.n_completions
        later = [_permutation(n, self.train.seed, rollout.index, epoch) for epoch in range(1, self.config.epochs)]
        return torch.from_numpy(np.concatenate([np.arange(n), *later]))

    def _said(self, completion: Completion) -> list[int]:
        """Return the tokens of a completion but the one that ended it."""
        ids: list[int] = completion.tokens.tolist()
        return ids[:-1] if completion.stopped else ids


def _lengths(completions: Sequence[Completion]) -> dict[str, float]:
    """Return what there is to log of the lengths of completions, under TRL's names."""
    lengths = torch.tensor([len(c.tokens) for c in completions], dtype=torch.float64)
    stopped = torch.tensor([c.stopped for c in completions])
    return {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float((~stopped).double().mean()),
        "completions/mean_terminated_length": float(lengths[stopped].mean()) if stopped.any() else 0.0,
        # −log p of a sampled token has the distribution's entropy as its mean: an estimate of it, from the sampler.
        "sampling/entropy": float(-torch.cat([c.logprobs for c in completions]).mean()),
    }


def _permutation(n: int, *numbers: int) -> np.ndarray:
    return np.random.default_rng(numbers).permutation(n)
