"""Rules between keys and sections. Each rule is one generator that yields the problems it finds; all of them run.

A rule reads the configuration as the user wrote it (before `resolve`), so that a message shows the user's own values.
"""

import math
import re
from collections.abc import Callable, Iterator

from megascratch.config.check_batch import batch, data_parallel, deterministic_dp
from megascratch.config.check_fp8 import fp8, fp8_param_gather, fp8_recipe
from megascratch.config.check_graphs import compiled, cuda_graph
from megascratch.config.check_layers import experts, latent_attention, model_features
from megascratch.config.check_precision import master_remainders, master_weights, narrow_averages, narrow_gradients
from megascratch.config.check_preferences import adapters, preferences, scalar_head
from megascratch.config.check_rollouts import rollouts
from megascratch.config.schema import Config
from megascratch.config.words import divisors, multiples_near
from megascratch.errors import Problem

Rule = Callable[[Config, int | None], Iterator[Problem]]


def check(config: Config, world_size: int | None = None) -> Iterator[Problem]:
    """Yield every problem of a configuration.

    Args:
        config: typed, not yet resolved.
        world_size: ranks that will run, or None when the layout itself decides.
    """
    for rule in RULES:
        yield from rule(config, world_size)


def _heads(config: Config, _: int | None) -> Iterator[Problem]:
    model = config.model
    kv_heads = model.n_kv_heads or model.n_heads
    head_dim = model.head_dim or model.hidden // model.n_heads
    if model.mla is not None:
        yield from latent_attention(model)
    elif model.head_dim is None and model.hidden % model.n_heads:
        yield Problem(
            f"model.hidden = {model.hidden}",
            f"must divide by model.n_heads = {model.n_heads} unless model.head_dim is given",
            f"use {multiples_near(model.hidden, model.n_heads)}, or set model.head_dim",
        )
    elif model.position == "rope" and head_dim % 2:
        yield Problem(f"model.head_dim = {head_dim}", "must be even for rotary positions", f"use {head_dim + 1}")
    if model.n_heads % kv_heads:
        yield Problem(
            f"model.n_kv_heads = {kv_heads}",
            f"must divide model.n_heads = {model.n_heads}",
            f"use {divisors(model.n_heads)}",
        )
    if model.rope_scaling is not None and model.position != "rope":
        yield Problem(
            f"model.rope_scaling.type = {model.rope_scaling.type}",
            f"needs model.position = rope, not {model.position}",
            "remove [model.rope_scaling]",
        )
    elif model.rope_scaling is not None:
        rotated = head_dim if model.mla is None else model.mla.qk_pos_emb_head_dim
        n_pairs = rotated // 2 if model.rope_scaling.type == "longrope" else 0
        for name in ("short_factor", "long_factor"):
            if len(factors := getattr(model.rope_scaling, name)) != n_pairs:
                value = f"model.rope_scaling.{name} = {len(factors)} numbers"
                yield Problem(value, f"must be {n_pairs} with type = {model.rope_scaling.type}", "one a pair, or none")


def _tensor_parallel(config: Config, _: int | None) -> Iterator[Problem]:
    model, tp = config.model, config.parallel.tp
    kv_heads = model.n_kv_heads or model.n_heads
    # A tp that does not fit the heads will change: what else it does not divide is no news.
    if model.n_heads % tp:
        yield Problem(
            f"parallel.tp = {tp}", f"must divide model.n_heads = {model.n_heads}", f"use {divisors(model.n_heads)}"
        )
        return
    if kv_heads % tp:
        yield Problem(
            f"parallel.tp = {tp}",
            f"must divide model.n_kv_heads = {kv_heads}: a key/value head lies on one rank",
            f"use {divisors(kv_heads)}",
        )
        return
    if model.ffn_hidden % tp:
        yield Problem(
            f"parallel.tp = {tp}",
            f"must divide model.ffn_hidden = {model.ffn_hidden}",
            f"use an ffn_hidden of {multiples_near(model.ffn_hidden, tp)}",
        )
    sequence_parallel = config.parallel.sequence_parallel is not False and tp > 1
    if sequence_parallel and config.data.seq_length % tp:
        yield Problem(
            f"data.seq_length = {config.data.seq_length}",
            f"must divide by parallel.tp = {tp} under sequence parallelism",
            f"use {multiples_near(config.data.seq_length, tp)}",
        )


# Schedules that run with one number of stages a rank alone.
CHUNKS = {
    "gpipe": 1,
    "1f1b": 1,
    "zb-h1": 1,
    "zb-h2": 1,
    "dualpipe": 1,
    "zb-v": 2,
    "v-half": 2,
    "v-min": 2,
    "dualpipe-v": 2,
}


def _pipeline(config: Config, _: int | None) -> Iterator[Problem]:
    parallel, n_layers = config.parallel, config.model.n_layers
    stages = parallel.pp * parallel.vp
    given = parallel.layers_per_stage
    # Given or balanced, the ends may go without a layer: they have the embedding and the head.
    if stages > n_layers + (0 if given is None else 2):
        yield Problem(
            f"parallel.pp = {parallel.pp}, vp = {parallel.vp}",
            f"make {stages} stages of {n_layers} layers: every stage needs one",
            f"use pp × vp ≤ {n_layers}",
        )
    if isinstance(given, list) and (len(given) != stages or sum(given) != n_layers or 0 in given[1:-1]):
        yield Problem(
            f"parallel.layers_per_stage = {given}",
            f"must be {stages} numbers with the sum {n_layers}, only the first and last of which may be 0",
            "use balanced, or leave it out",
        )
    if parallel.vp > 1 and parallel.pp == 1:
        yield Problem(f"parallel.vp = {parallel.vp}", "needs parallel.pp > 1", "set vp = 1 or pp = 2 or more")
    if parallel.schedule is not None and parallel.schedule_file is not None:
        yield Problem(f"parallel.schedule = {parallel.schedule}", "goes without schedule_file", "leave one of them out")
    elif parallel.schedule == "interleaved" and parallel.vp == 1:
        yield Problem("parallel.schedule = interleaved", "needs parallel.vp > 1", "set vp = 2, or use 1f1b")
    elif parallel.schedule in CHUNKS and parallel.vp != CHUNKS[parallel.schedule]:
        chunks = CHUNKS[parallel.schedule]
        yield Problem(
            f"parallel.schedule = {parallel.schedule}",
            f"runs {chunks} stage{'s' if chunks > 1 else ''} a rank, not vp = {parallel.vp}",
            f"set vp = {chunks}" if chunks > 1 else "use interleaved, or vp = 1",
        )
    if parallel.schedule == "dualpipe" and parallel.pp % 2:
        yield Problem(f"parallel.pp = {parallel.pp}", "must be even for dualpipe", f"use {parallel.pp + 1}")


def _recompute(config: Config, _: int | None) -> Iterator[Problem]:
    parallel = config.parallel
    for key, of in (("recompute_modules", "selective"), ("recompute_layers", "block"), ("memory_budget_gib", "auto")):
        value = getattr(parallel, key)
        if value is not None and parallel.recompute != of:
            rule = f"goes with recompute = {of}, not {parallel.recompute}"
            yield Problem(f"parallel.{key} = {value}", rule, f"set recompute = {of}, or leave {key} out")
    for key, of in (("recompute_layers", "block"), ("memory_budget_gib", "auto")):
        if parallel.recompute == of and getattr(parallel, key) is None:
            yield Problem(f"parallel.recompute = {of}", f"needs parallel.{key}", f"set {key}")


def _context_parallel(config: Config, _: int | None) -> Iterator[Problem]:
    model, parallel, seq_length = config.model, config.parallel, config.data.seq_length
    if parallel.cp == 1:
        return
    sequence_parallel = parallel.sequence_parallel is not False and parallel.tp > 1
    # Each rank holds two chunks; under sequence parallelism the two together are divided over tp once more.
    step = parallel.cp * (math.lcm(2, parallel.tp) if sequence_parallel else 2)
    if seq_length % step:
        yield Problem(
            f"data.seq_length = {seq_length}",
            f"must divide by {step}: two chunks for each of parallel.cp = {parallel.cp} ranks, each rank's over tp",
            f"use {multiples_near(seq_length, step)}",
        )
    kv_heads = model.n_kv_heads or model.n_heads
    if parallel.cp_algorithm == "ulysses" and kv_heads % (parallel.tp * parallel.cp):
        yield Problem(
            f"parallel.cp = {parallel.cp}",
            f"times tp {parallel.tp} must divide model.n_kv_heads = {kv_heads}: ulysses divides the heads",
            "use cp_algorithm = ring",
        )
    if model.dropout > 0:
        yield Problem(
            f"model.dropout = {model.dropout}",
            f"does not go with parallel.cp = {parallel.cp}",
            "set model.dropout = 0, or cp = 1",
        )


def _zero(config: Config, world_size: int | None) -> Iterator[Problem]:
    parallel, n = config.parallel, config.parallel.zero_ranks
    if n is None:
        return
    data = parallel.cp * data_parallel(config, world_size)
    if data % n:
        yield Problem(
            f"parallel.zero_ranks = {n}", f"must divide dp × cp = {data}", f"use {divisors(data)}, or leave it out"
        )
    elif parallel.zero == 0:
        yield Problem(f"parallel.zero_ranks = {n}", "needs parallel.zero > 0", "set parallel.zero, or leave it out")
    elif parallel.ep > 1:
        yield Problem(f"parallel.zero_ranks = {n}", f"does not go with parallel.ep = {parallel.ep}", "leave it out")


def _offload(config: Config, _: int | None) -> Iterator[Problem]:
    parallel = config.parallel
    if parallel.offload_parameters and parallel.zero != 3:
        rule = f"needs parallel.zero = 3, not {parallel.zero}: others have all weights on every rank"
        yield Problem("parallel.offload_parameters = true", rule, "set zero = 3, or leave it out")
    for key in ("offload_optimizer", "offload_parameters"):
        if getattr(parallel, key) and config.optim.name != "adamw":
            rule = f"does not go with optim.name = {config.optim.name}, whose matrices travel between devices"
            yield Problem(f"parallel.{key} = true", rule, "use adamw")


def _world(config: Config, world_size: int | None) -> Iterator[Problem]:
    if world_size is None:
        return
    parallel = config.parallel
    others = parallel.tp * parallel.pp * parallel.cp
    if parallel.dp is None:
        if world_size % others:
            yield Problem(
                f"world size = {world_size}",
                f"must divide by tp {parallel.tp} × pp {parallel.pp} × cp {parallel.cp} = {others}",
                f"start {multiples_near(world_size, others)} ranks",
            )
    elif world_size != others * parallel.dp:
        yield Problem(
            f"world size = {world_size}",
            f"must be tp {parallel.tp} × pp {parallel.pp} × cp {parallel.cp} × dp {parallel.dp}"
            f" = {others * parallel.dp}",
            f"start {others * parallel.dp} ranks, or leave parallel.dp out",
        )


def _lengths(config: Config, _: int | None) -> Iterator[Problem]:
    if config.data.seq_length > config.model.max_seq_length:
        yield Problem(
            f"data.seq_length = {config.data.seq_length}",
            f"must not exceed model.max_seq_length = {config.model.max_seq_length}",
            "shorten the sequence, or raise model.max_seq_length",
        )


def _data(config: Config, _: int | None) -> Iterator[Problem]:
    data = config.data
    if data.reset_attention_mask and not data.reset_position_ids:
        yield Problem(
            "data.reset_attention_mask = true",
            "needs data.reset_position_ids = true, which marks where documents begin",
            "set both",
        )
    if data.weights is not None and len(data.weights) != len(data.paths):
        yield Problem(
            f"data.weights has {len(data.weights)} entries",
            f"must have one for each of the {len(data.paths)} data.paths",
            "give one weight a path, or none",
        )
    # Digits and points only, as Megatron finds them: it would read 1e3 as two weights, and -1 as 1.
    shares = data.split.split(",")
    plain = all(re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*", share, re.ASCII) for share in shares)
    if not plain or len(shares) > 3 or sum(map(float, shares)) == 0:
        yield Problem(
            f"data.split = {data.split!r}",
            "must be one to three weights, of train, validation and test, that are not all 0",
            "for example 969,30,1",
        )


def _tp_comm_overlap(config: Config, _: int | None) -> Iterator[Problem]:
    parallel = config.parallel
    if not parallel.tp_comm_overlap or parallel.tp == 1:
        return
    rule = "does not go with parallel.tp_comm_overlap"
    if parallel.sequence_parallel is False:
        yield Problem("parallel.sequence_parallel = false", rule, "its collectives are what overlaps: switch it on")
    if config.train.dtype == "fp8":
        yield Problem("train.dtype = fp8", rule, "use bf16, or leave tp_comm_overlap out")


def _steps(config: Config, _: int | None) -> Iterator[Problem]:
    optim, steps = config.optim, config.train.steps
    if optim.min_lr > optim.lr:
        yield Problem(f"optim.min_lr = {optim.min_lr}", f"must not exceed optim.lr = {optim.lr}", "lower optim.min_lr")
    if optim.warmup_steps > steps:
        yield Problem(
            f"optim.warmup_steps = {optim.warmup_steps}",
            f"must not exceed train.steps = {steps}",
            "shorten the warm-up",
        )


def _local_copies(config: Config, _: int | None) -> Iterator[Problem]:
    checkpoint = config.checkpoint
    if checkpoint.local_every and checkpoint.local_dir is None:
        rule = "needs checkpoint.local_dir, on the node"
        yield Problem(f"checkpoint.local_every = {checkpoint.local_every}", rule, "for example /dev/shm/megascratch")
    if checkpoint.local_dir is not None and not checkpoint.local_every:
        rule = "needs checkpoint.local_every"
        yield Problem(f"checkpoint.local_dir = {checkpoint.local_dir}", rule, "set it, or leave local_dir out")
    if checkpoint.local_replicate and not checkpoint.local_every:
        rule = "needs checkpoint.local_every: there is nothing to replicate"
        yield Problem("checkpoint.local_replicate = true", rule, "set it, or leave local_replicate out")


def _recycling(config: Config, _: int | None) -> Iterator[Problem]:
    checkpoint = config.checkpoint
    if checkpoint.recycle and not checkpoint.keep:
        yield Problem("checkpoint.recycle = true", "needs checkpoint.keep, or no file is ever free", "set keep = 2")
    if checkpoint.recycle and "://" in (checkpoint.dir or ""):
        yield Problem("checkpoint.recycle = true", "needs a path: nothing is renamed behind a URL", "leave it out")


RULES: tuple[Rule, ...] = (
    _heads,
    model_features,
    _tensor_parallel,
    _pipeline,
    experts,
    _recompute,
    _context_parallel,
    _zero,
    _offload,
    _world,
    batch,
    deterministic_dp,
    _lengths,
    scalar_head,
    adapters,
    preferences,
    _data,
    fp8,
    fp8_recipe,
    fp8_param_gather,
    _tp_comm_overlap,
    compiled,
    cuda_graph,
    master_weights,
    master_remainders,
    narrow_gradients,
    narrow_averages,
    _steps,
    _local_copies,
    _recycling,
    rollouts,
)
