"""Generation on the weights in training, in a layout of its own: pipeline and context ranks become replicas.

    training      pp 2 × dp 1 × cp 1 × tp 2        ranks 0 1 | 2 3       each pair holds half of the layers
    generation    dp 2 × tp 2                      replicas 0 1 | 2 3    each pair holds all of them

Weights move between the two in memory (`checkpoint.exchange`), whatever divides them, ZeRO-3 included. A tensor that a
rank holds in training just as generation wants it is shared, and neither copied nor sent.

Every replica takes every r-th prompt, and all ranks get all completions: what a sequence becomes depends on its number
alone (`infer.decoding`), not on who generates it.
"""

from collections.abc import Sequence

import numpy as np
import torch

from megascratch.checkpoint import Shard, weight_shards
from megascratch.checkpoint.exchange import Exchange
from megascratch.config import ParallelConfig
from megascratch.config.check import check
from megascratch.dist import comm
from megascratch.dist.mesh import Mesh, MeshSpec
from megascratch.engine import Engine
from megascratch.engine.state import engine_shards
from megascratch.errors import LayoutError
from megascratch.infer import Completion, Sampling, complete
from megascratch.infer.decoding import Prompt
from megascratch.nn import DTYPES, Placement, Stage, add_adapters, core_for


class Generator:
    """A model for generation that takes its weights from an engine.

    Args:
        engine: whose weights are used as they are at each `sync`.
        tp: tensor-parallel ranks of a replica; those of training when left out.

    Raises: LayoutError: if the world or the model does not divide over tp.
    """

    def __init__(self, engine: Engine, tp: int | None = None) -> None:
        self.engine, config = engine, engine.config
        world, tp = engine.mesh.world, tp or engine.mesh.tp.size
        layout = ParallelConfig(tp=tp, dp=max(1, world.size // tp), sequence_parallel=False)
        unbatched = config.train.model_copy(update={"global_batch": layout.dp, "micro_batch": 1})
        alone = config.model_copy(update={"parallel": layout, "train": unbatched, "rollout": None})
        if problems := list(check(alone, world.size)):
            raise LayoutError(problems, f"generation on tp {tp}")
        self.mesh = Mesh.create(MeshSpec.of(layout), engine.mesh.device, engine.mesh.roll_call)
        placement = Placement(self.mesh.tp, False, DTYPES[config.train.dtype], self.mesh.device)
        core = core_for(config.train.attention, self.mesh.device)
        self.stage = Stage(config.model, placement, core=core)
        if config.lora is not None:
            add_adapters(self.stage, config.lora)
        self.stage.eval().requires_grad_(False)
        for param in self.stage.parameters():
            param.zero_()  # padding, which nobody sends
        sources = engine_shards(engine)
        targets = weight_shards(self.stage.parameters(), self.mesh)
        held = {source.name: source for source in sources}
        missing = []
        for param, target in zip(self.stage.parameters(), targets, strict=True):
            source = held.get(target.name)
            if source is not None and _is_alike(source, target):
                param.data = source.tensor
            else:
                missing.append(target)
        self._exchange = Exchange(sources, missing, world, engine.mesh.device)

    def sync(self) -> None:
        """Take over the engine's weights. Every rank calls this."""
        self.engine.optimizer.overlap.settle()
        self._exchange.run()

    def complete(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        max_tokens: int,
        stop_ids: Sequence[int],
        n_ids: int | None,
        samples: int,
        first_sequence: int,
        batch: int,
    ) -> list[Completion]:
        """Continue prompts, the same on every rank, which all call this.

        Args:
            prompts, sampling, max_tokens, stop_ids, n_ids, samples: as for `infer.complete`.
            first_sequence: number of the first completion; the others follow.
            batch: completions that a replica generates at once.

        Returns: `samples` completions of the first prompt, then those of the second, and so on.
        """
        replicas = self.mesh.data
        own = range(replicas.rank, len(prompts), replicas.size)
        done: list[Completion] = []
        step = max(1, batch // samples)
        for start in range(0, len(own), step):
            part = own[start : start + step]
            done += complete(
                self.stage,
                [prompts[i] for i in part],
                sampling,
                max_tokens=max_tokens,
                stop_ids=stop_ids,
                n_ids=n_ids,
                samples=samples,
                sequences=[first_sequence + i * samples + j for i in part for j in range(samples)],
            )
        everyone = [_unpacked(data) for data in comm.gather_bytes(_packed(done), replicas, self.mesh.device)]
        completions: list[Completion] = []
        for i in range(len(prompts)):
            replica, turn = i % replicas.size, i // replicas.size
            completions += everyone[replica][turn * samples : (turn + 1) * samples]
        return completions


def _is_alike(source: Shard, target: Shard) -> bool:
    """Return whether a rank holds a tensor in training just as generation wants it."""
    same_place = list(source.extents) == list(target.extents)
    return same_place and source.tensor.shape == target.tensor.shape and source.tensor.dtype == target.tensor.dtype


def _packed(completions: Sequence[Completion]) -> bytes:
    """Return completions as bytes: how many; of each its length and whether it stopped; tokens; log-probabilities."""
    heads = [[len(c.tokens), int(c.stopped)] for c in completions]
    tokens = torch.cat([c.tokens for c in completions]) if completions else torch.empty(0, dtype=torch.int64)
    logprobs = torch.cat([c.logprobs for c in completions]) if completions else torch.empty(0)
    numbers = np.concatenate([[len(heads)], np.array(heads, np.int64).reshape(-1), tokens.numpy()]).astype(np.int64)
    return numbers.tobytes() + logprobs.double().numpy().tobytes()


def _unpacked(data: bytes) -> list[Completion]:
    n = int(np.frombuffer(data, np.int64, 1)[0])
    heads = np.frombuffer(data, np.int64, 2 * n, 8).reshape(n, 2)
    total = int(heads[:, 0].sum())
    tokens = torch.from_numpy(np.frombuffer(data, np.int64, total, 8 + 16 * n).copy())
    logprobs = torch.from_numpy(np.frombuffer(data, np.float64, total, 8 + 16 * n + 8 * total).copy())
    lengths = heads[:, 0].tolist()
    parts = zip(tokens.split(lengths), logprobs.split(lengths), heads[:, 1])
    return [Completion(tokens, logprobs, bool(stopped)) for tokens, logprobs, stopped in parts]
