"""Pretraining, as one rank runs it: join the world, open the data, build or resume the engine, train."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

import megascratch
from megascratch.config import Config
from megascratch.data.blend import Datasets, build_datasets
from megascratch.data.sampler import Batches
from megascratch.data.samples import EodRules
from megascratch.dist.agreement import code_digest, require_agreement
from megascratch.dist.launch import Environment, process_group, share_cores
from megascratch.dist.mesh import Mesh, MeshSpec
from megascratch.engine.engine import Engine
from megascratch.engine.metrics import RunDirectory
from megascratch.engine.objective import next_token
from megascratch.engine.state import load_engine, require_equal_replicas
from megascratch.engine.trainer import Trainer
from megascratch.log import make_console
from megascratch.tokenizer import Tokenizer, formats


def pretrain(config: Config, environment: Environment | None) -> int:
    """Train this rank's part of a model.

    Args:
        config: resolved and checked, `model.vocab_size` included.
        environment: who this process is; None for a run of one rank.

    Returns: exit code: 0 done, 75 stopped by a signal after saving a checkpoint.

    Raises: UserError: if data, tokenizer or checkpoint do not fit the recipe.
    """
    environment = environment or Environment(rank=0, world_size=1, local_rank=0, local_world_size=1)
    share_cores(environment.local_world_size)
    world = process_group(environment, config.train.timeout_s) if environment.world_size > 1 else nullcontext()
    with world:
        return _train(config, Mesh.create(MeshSpec.of(config.parallel), environment.device))


def _train(config: Config, mesh: Mesh) -> int:
    console = make_console(mesh.rank)
    versions = {"megascratch": megascratch.__version__, "its code": code_digest(), "torch": torch.__version__}
    require_agreement({**versions, **config.model_dump(mode="json")}, mesh.world, mesh.device)
    tokenizer = formats.open_tokenizer(Path(config.data.tokenizer)) if config.data.tokenizer else None
    datasets = open_datasets(config, tokenizer)
    train = _batches(datasets, "train", config, mesh)
    assert train is not None
    train.require(config.train.steps * config.train.global_batch)
    run = RunDirectory(config, writes=mesh.rank == 0)
    engine = Engine(config, mesh)
    consumed_samples = 0
    source = resume_path(config)
    if source is not None:
        consumed_samples = load_engine(engine, source)
        console.print(f"resumed from {source} after step {engine.step}")
    require_equal_replicas(engine)
    trainer = Trainer(
        engine,
        next_token,
        train,
        _batches(datasets, "valid", config, mesh),
        None if tokenizer is None else token_lengths(tokenizer, config.model.vocab_size or 0),
        run,
        console,
        consumed_samples,
    )
    return trainer.run()


def open_datasets(config: Config, tokenizer: Tokenizer | None) -> Datasets:
    """Open the datasets that a recipe names, cut into as many samples as the run reads.

    Raises: DataError: if one is missing, damaged, too small, or holds ids outside the vocabulary.
    """
    data, train = config.data, config.train
    shares = [float(share) for share in data.split.split(",")]
    n_valid = config.eval.batches * train.global_batch if any(shares[1:2]) else 0
    return build_datasets(
        data.paths,
        data.weights,
        data.split,
        data.seq_length,
        train.seed,
        (train.steps * train.global_batch, n_valid, 0),
        data.cache_dir,
        rules=EodRules(
            tokenizer.eod_id if tokenizer is not None else None, data.eod_mask_loss, data.reset_position_ids
        ),
        vocab_size=config.model.vocab_size,
    )


def resume_path(config: Config) -> Path | None:
    """Return the checkpoint that a run starts from: `checkpoint.load`, or else its own newest, or none."""
    if config.checkpoint.load is not None:
        return Path(config.checkpoint.load)
    assert config.checkpoint.dir is not None
    own = Path(config.checkpoint.dir)
    return own if (own / "latest").exists() else None


def token_lengths(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """Return how many bytes each id of the model's vocabulary stands for, [vocab_size] float32; unused ids: none."""
    lengths = np.zeros(vocab_size, dtype=np.float32)
    lengths[: tokenizer.vocab_size] = tokenizer.byte_lengths()
    return lengths


def _batches(datasets: Datasets, part: str, config: Config, mesh: Mesh) -> Batches | None:
    dataset = getattr(datasets, part)
    if dataset is None:
        return None
    train = config.train
    return Batches(dataset, train.global_batch, train.micro_batch, mesh.dp.rank, mesh.dp.size)
