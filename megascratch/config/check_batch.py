"""Rules of the batch: every size that it has must be made of whole micro-batches on every data-parallel rank."""

from collections.abc import Iterator

from megascratch.config.schema import Config
from megascratch.config.words import multiples_near
from megascratch.errors import Problem


def data_parallel(config: Config, world_size: int | None) -> int:
    """Return dp, also where it follows from the world."""
    parallel = config.parallel
    others = parallel.tp * parallel.pp * parallel.cp
    return parallel.dp if parallel.dp is not None else max(1, (world_size or others) // others)


def batch(config: Config, world_size: int | None) -> Iterator[Problem]:
    parallel, train = config.parallel, config.train
    dp = data_parallel(config, world_size)
    step = train.micro_batch * dp
    if train.global_batch % step:
        yield Problem(
            f"train.global_batch = {train.global_batch}",
            f"must divide by micro_batch {train.micro_batch} × dp {dp}",
            f"use {multiples_near(train.global_batch, step)}",
        )
        return
    key, size = "global_batch", train.global_batch
    if train.rampup_batch_size is not None:
        problems = list(_rampup(config, step))
        yield from problems
        if problems:
            return
        key, size = "rampup_batch_size[0]", train.rampup_batch_size[0]
    microbatches, least = size // step, 2 * parallel.pp
    if parallel.schedule in ("dualpipe", "dualpipe-v") and microbatches < least:
        yield Problem(
            f"train.{key} = {size}",
            f"gives {microbatches} microbatches, and {parallel.schedule} needs {least}: twice pp",
            f"use {step * least} or more, or zb-v",
        )
    elif parallel.schedule == "dualpipe" and microbatches % 2:
        yield Problem(
            f"train.{key} = {size}",
            f"gives {microbatches} microbatches, half of which go each way in dualpipe",
            f"use {multiples_near(size, 2 * step)}",
        )


def _rampup(config: Config, step: int) -> Iterator[Problem]:
    """Rules of a batch that grows; `step` samples are one micro-batch on every data-parallel rank."""
    parallel, train = config.parallel, config.train
    assert train.rampup_batch_size is not None
    start, increment, samples = train.rampup_batch_size
    value = f"train.rampup_batch_size = [{start}, {increment}, {samples}]"
    if start >= train.global_batch or (train.global_batch - start) % increment:
        rule = f"must reach train.global_batch = {train.global_batch} from {start} in steps of {increment}"
        yield Problem(value, rule, "use a smaller start, and an increment that divides the rest")
        return
    if parallel.schedule == "dualpipe":
        step *= 2  # every batch is one that goes half each way, if the last one is
    for name, number in (("start", start), ("increment", increment)):
        if number % step:
            rule = f"{name} must divide by micro_batch × dp{' × 2' * (parallel.schedule == 'dualpipe')} = {step}"
            yield Problem(value, rule, f"use {multiples_near(number, step)}")
    one_size = {
        "parallel.schedule_file": parallel.schedule_file,
        "train.cuda_graph": train.cuda_graph,
        "rollout": config.rollout,
    }
    for key, other in one_size.items():
        if other:
            yield Problem(value, f"does not go with {key}, which is made for batches of one size", f"leave {key} out")


_IN_ORDER = (None, "gpipe", "1f1b", "interleaved")  # schedules that end a micro-batch's backward before the next one's


def deterministic_dp(config: Config, world_size: int | None) -> Iterator[Problem]:
    """What would add gradients in an order that changes with dp."""
    parallel, dp = config.parallel, data_parallel(config, world_size)
    if not parallel.deterministic_dp:
        return
    key = "parallel.deterministic_dp"
    if dp & (dp - 1):
        rule = f"must be a power of two with {key}"
        yield Problem(f"parallel.dp = {dp}", rule, f"use {1 << dp.bit_length() - 1} or {1 << dp.bit_length()}")
    remedies = (
        ("zero", parallel.zero, (0,), "its runs divide the norm's sums: set zero = 0"),
        ("ep", parallel.ep, (1,), "an expert's product sums over several ranks' tokens: set ep = 1"),
        ("schedule", parallel.schedule, _IN_ORDER, "use 1f1b, gpipe or interleaved"),
        ("schedule_file", parallel.schedule_file, (None,), "use a named schedule"),
    )
    for name, value, allowed, remedy in remedies:
        if value not in allowed:
            yield Problem(f"parallel.{name} = {value}", f"does not go with {key}", remedy)
    if config.train.cuda_graph:
        yield Problem("train.cuda_graph = true", f"does not go with {key}", "leave one of them out")
