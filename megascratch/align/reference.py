"""What a frozen reference thinks of the answers: once for all, by a second model, or by this one without its adapters.

    precomputed   a number for each answer, computed before the first step and kept in the run directory
    live          a second model of this layout, in memory throughout; nothing is stored
    base          this model with its adapters off: the weights are there anyway

The reference is what the run began with: `checkpoint.init`, or the initial weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megascratch.align.pairs import answer_logprobs
from megascratch.align.rows import Rows
from megascratch.align.sources import Complete, batches_of
from megascratch.config import Config
from megascratch.data.microbatch import Microbatch
from megascratch.dist import comm
from megascratch.dist.mesh import Mesh
from megascratch.engine import Engine
from megascratch.engine.state import load_weights
from megascratch.log import make_console, progress


def reference_of(config: Config, mesh: Mesh, engine: Engine, rows: Sequence[Rows], how: str) -> Complete:
    """Return what adds `reference`, the summed log-probability of each answer [b, n], to micro-batches.

    Args:
        config: of the run.
        mesh: this rank's place.
        engine: the model that learns, loaded where it resumes.
        rows: all rows that micro-batches are made of.
        how: `dpo.reference`.
    """
    if how == "precomputed":
        return _looked_up(_table(config, mesh, engine, rows))

    def scored(scores: Callable[[list[Microbatch]], list[Tensor]]) -> Complete:
        return lambda microbatches: [_with(m, x) for m, x in zip(microbatches, scores(microbatches))]

    if how == "live":
        frozen = frozen_engine(config, mesh)
        return scored(lambda microbatches: frozen.compute(microbatches, answer_logprobs))

    def without_adapters(microbatches: list[Microbatch]) -> list[Tensor]:
        with engine.adapters_off():
            return engine.compute(microbatches, answer_logprobs)

    return scored(without_adapters)


def frozen_engine(config: Config, mesh: Mesh) -> Engine:
    """Return a second engine that does not learn, with the weights that the run began with.

    It has no adapters; where the base is packed, it has new ones, which change nothing, beside the same packed base.
    """
    is_packed = config.lora is not None and config.lora.base != "full"
    engine = Engine(config if is_packed else config.model_copy(update={"lora": None}), mesh, learns=False)
    if config.checkpoint.init is not None:
        load_weights(engine, Path(config.checkpoint.init))
    return engine


def _with(microbatch: Microbatch, reference: Tensor) -> Microbatch:
    reference = reference.to(microbatch.tokens.device)
    return replace(microbatch, of_samples={**microbatch.of_samples, "reference": reference})


def _looked_up(table: Tensor) -> Complete:
    """Look answers up by their number."""

    def complete(microbatches: list[Microbatch]) -> list[Microbatch]:
        return [_with(m, table[m.of_samples["answer"]]) for m in microbatches]

    return complete


def _table(config: Config, mesh: Mesh, engine: Engine, rows: Sequence[Rows]) -> Tensor:
    """Return the reference's numbers of all answers, [answers] float64: kept ones, or computed now.

    A reference that is what the run begins with is the engine itself, before its first step.
    """
    file = Path(config.log.dir) / "reference_logprobs.safetensors"
    key = _digest(rows, config.checkpoint.init)
    kept = _kept(file, key)
    everyone_has_it = 1 - comm.max_over(torch.tensor(float(kept is None), device=mesh.device), mesh.world)
    if kept is not None and everyone_has_it:
        return kept
    scorer = engine if engine.step == 0 and config.lora is None else frozen_engine(config, mesh)
    table = computed(config, mesh, scorer, rows)
    if mesh.rank == 0:
        save_file({"logprobs": table.cpu()}, file, metadata={"of": key})
    comm.barrier(mesh.world)
    return table.cpu()


def computed(config: Config, mesh: Mesh, engine: Engine, rows: Sequence[Rows]) -> Tensor:
    """Return an engine's summed log-probability of every answer, [answers] float64, on every rank."""
    n_answers = sum(part.n_answers for part in rows)
    total, times = (torch.zeros(n_answers, dtype=torch.float64, device=mesh.device) for _ in range(2))
    global_batch = config.train.global_batch
    with progress(make_console(mesh.rank), "reference", sum(part.epoch_samples for part in rows), "rows") as advance:
        for part in rows:
            batches = batches_of(config, mesh, part.in_order())
            n_steps = -(-part.epoch_samples // global_batch)  # the last one wraps round
            for microbatches in batches.steps(0, n_steps):
                for microbatch, scores in zip(microbatches, engine.compute(microbatches, answer_logprobs)):
                    present = microbatch.of_samples["present"].to(mesh.device) > 0
                    places = microbatch.of_samples["answer"].to(mesh.device)[present]
                    total[places], times[places] = scores[present].double(), 1.0
                advance(global_batch)
    total, times = comm.sum_over(total, mesh.dp), comm.sum_over(times, mesh.dp)
    return total / times.clamp(min=1)


def _digest(rows: Sequence[Rows], init: str | None) -> str:
    """Name what the numbers depend on: every answer's tokens, in order, and the reference."""
    digest = xxhash.xxh3_128(str(init).encode())
    for part in rows:
        for example in part.examples:
            for sequence in example.sequences:
                digest.update(sequence.ids.tobytes())
                digest.update(sequence.learned.tobytes())
    return digest.hexdigest()


def _kept(file: Path, key: str) -> Tensor | None:
    """Return what an earlier part of this run computed, if it was of the same answers."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as opened:
            is_same = (opened.metadata() or {}).get("of") == key
            return opened.get_tensor("logprobs") if is_same else None
    except SafetensorError:  # a run that was killed while writing
        return None
