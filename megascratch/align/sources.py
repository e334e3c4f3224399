"""Batches of rows for a rank, split into training and validation, and batches that are completed before each step."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from megascratch.align.examples import Example, open_template
from megascratch.align.rows import Rows, collate_rows
from megascratch.config import ChatConfig, Config
from megascratch.data.microbatch import Microbatch
from megascratch.data.sampler import Batches
from megascratch.dist.mesh import Mesh
from megascratch.engine import Objective, Source, Task, Totals, Validation, valid_loss
from megascratch.errors import ConfigError, DataError, Problem

Complete = Callable[[list[Microbatch]], list[Microbatch]]


class Completed:
    """Batches to which something is added when their step comes, by the engine as it then is.

    Args:
        batches: what is completed; may read ahead.
        complete: given a step's micro-batches, adds to them; every rank calls it alike.
    """

    def __init__(self, batches: Source, complete: Complete) -> None:
        self.batches, self.complete = batches, complete

    def steps(self, consumed_samples: int, n_steps: int, prefetch: int = 2) -> Iterator[list[Microbatch]]:
        """Yield the micro-batches of steps; reading may be ahead, completing is not."""
        for microbatches in self.batches.steps(consumed_samples, n_steps, prefetch):
            yield self.complete(microbatches)


def keep_template(config: Config, mesh: Mesh) -> None:
    """Put the chat template into the run directory, beside the tokenizer: the model answers to no other."""
    if mesh.rank == 0:
        open_template(config).save(Path(config.log.dir))


class Sets(NamedTuple):
    """Rows to train on, in an order anew for each epoch, and rows to validate with, if there are any."""

    train: Rows
    valid: Rows | None

    @property
    def rows(self) -> list[Rows]:
        """All there are."""
        return [self.train] if self.valid is None else [self.train, self.valid]

    def task(
        self,
        config: Config,
        mesh: Mesh,
        objective: Objective,
        complete: Sequence[Complete] = (),
        describe: Callable[[Totals], dict[str, float]] = valid_loss,
    ) -> Task:
        """Return the task of minimising an objective over the rows.

        Args:
            config: resolved.
            mesh: this rank's place.
            objective: of training and validation.
            complete: for each of `rows`, adds to a step's micro-batches what the objective needs besides.
            describe: see `Validation`.
        """

        sources: list[Source] = [batches_of(config, mesh, rows, grows=rows is self.train) for rows in self.rows]
        if complete:
            sources = [Completed(batches, one) for batches, one in zip(sources, complete)]
        if self.valid is None:
            return Task(objective, sources[0])
        # One pass at the most, and one batch at the least.
        n_steps = max(1, min(config.eval.batches, self.valid.epoch_samples // config.train.global_batch))
        return Task(objective, sources[0], Validation(sources[1], n_steps, objective, describe))


def batches_of(config: Config, mesh: Mesh, rows: Rows, grows: bool = False) -> Batches:
    """Return this rank's batches of rows; they may grow in training alone."""
    return Batches.of(config, rows, mesh.dp, collate_rows, grows)


def open_sets(
    config: Config, examples: Sequence[Example], sizes: Sequence[int] | None = None, first_answer: int = 0
) -> Sets:
    """Divide examples, and lay them into rows.

    Args:
        config: resolved.
        examples: at least one.
        sizes, first_answer: see `Rows`.

    Raises: DataError: if no example is left to train on.
    """
    train, valid = divided(config, range(len(examples)))

    def rows(part: range, seed: int | None) -> Rows:
        own = None if sizes is None else [sizes[i] for i in part]
        packing = (config.chat or ChatConfig()).packing
        first = first_answer + part.start * len(examples[0].sequences)
        return Rows([examples[i] for i in part], config.data.seq_length, packing, seed, own, first)

    return Sets(rows(train, config.train.seed), rows(valid, seed=None) if valid else None)


def require_plain_layers(config: Config) -> None:
    """Check that the layers have no loss of their own: it is weighed by tokens, and answers weigh by their number.

    Raises: ConfigError: if they have.
    """
    model = config.model
    problems = []
    if (moe := model.moe) is not None:
        coefficients = {"aux_loss_coeff": moe.aux_loss_coeff, "z_loss_coeff": moe.z_loss_coeff}
        rule = "weighs tokens, and a loss of answers does not"
        problems = [Problem(f"model.moe.{k} = {v}", rule, "set it to 0") for k, v in coefficients.items() if v]
    if model.mtp_num_layers:
        rule = "predicts tokens, of which a loss of answers knows nothing"
        problems.append(Problem(f"model.mtp_num_layers = {model.mtp_num_layers}", rule, "set it to 0"))
    if problems:
        raise ConfigError(problems)


def require_whole_pairs(config: Config) -> None:
    """Check that rows of a pair stay in one micro-batch.

    Raises: ConfigError: if a micro-batch has an odd number of them.
    """
    packing = (config.chat or ChatConfig()).packing
    if not packing and config.train.micro_batch % 2:
        rule = "must be even: without packing, a pair is two rows"
        remedy = f"use {config.train.micro_batch + 1}, or set chat.packing"
        raise ConfigError(Problem(f"train.micro_batch = {config.train.micro_batch}", rule, remedy))


def divided(config: Config, examples: range) -> tuple[range, range]:
    """Return which examples to train on and which to validate with: parts by the shares of `data.split`.

    Raises: DataError: if no example is left to train on.
    """
    shares = [float(share) for share in config.data.split.split(",")] + [0.0, 0.0]
    ends = [round(len(examples) * sum(shares[: i + 1]) / sum(shares)) for i in range(2)]
    if ends[0] == 0:
        rule = f"leaves none of {len(examples)} examples to train on"
        raise DataError(Problem(f"data.split = {config.data.split}", rule, "raise its first share, or add data"))
    return examples[: ends[0]], examples[ends[0] : ends[1]]
