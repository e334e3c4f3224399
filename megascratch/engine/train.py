"""Any training, as one rank runs it: join the world, open the data, build or resume the engine, train."""

from contextlib import closing, nullcontext

import torch

import megascratch
from megascratch.config import Config
from megascratch.dist import comm
from megascratch.dist.agreement import code_digest, require_agreement
from megascratch.dist.launch import Environment, keep_freed_memory, process_group, share_cores
from megascratch.dist.mesh import Mesh
from megascratch.dist.watch import Watch
from megascratch.engine.checkpoints import Checkpoints, resume, resume_companions
from megascratch.engine.engine import Engine
from megascratch.engine.guard import Guard
from megascratch.engine.local_copies import LocalCopies
from megascratch.engine.metrics import RunDirectory
from megascratch.engine.state import require_equal_replicas
from megascratch.engine.task import Method
from megascratch.engine.trainer import Trainer
from megascratch.log import make_console


def train(config: Config, environment: Environment | None, method: Method) -> int:
    """Train this rank's part of a model.

    Args:
        config: resolved and checked, `model.vocab_size` included.
        environment: who this process is; None for a run of one rank.
        method: what to train on.

    Returns: exit code: 0 done, 75 stopped by a signal after saving a checkpoint.

    Raises: UserError: if data, tokenizer or checkpoint do not fit the recipe.
    """
    environment = environment or Environment(rank=0, world_size=1, local_rank=0, local_world_size=1)
    share_cores(environment.local_world_size)
    keep_freed_memory()
    world = process_group(environment, config.train.timeout_s) if environment.world_size > 1 else nullcontext()
    with world:
        return train_on(config, Mesh.of(config, environment.device), method)


def train_on(config: Config, mesh: Mesh, method: Method) -> int:
    """Train on a mesh that is there. Arguments, result and errors as of `train`."""
    with Watch.over_default_group(mesh.clock, config.train.timeout_s):
        return _train(config, mesh, method)


def _train(config: Config, mesh: Mesh, method: Method) -> int:
    console = make_console(mesh.rank)
    versions = {"megascratch": megascratch.__version__, "its code": code_digest(), "torch": torch.__version__}
    require_agreement({**versions, **config.model_dump(mode="json")}, mesh.world, mesh.device)
    begin = method(config, mesh)
    with closing(RunDirectory(config, writes=mesh.rank == 0)) as run:
        run_id = comm.gather_bytes(run.id.encode(), mesh.world, mesh.device)[0].decode()
        engine = Engine(config, mesh)
        local = LocalCopies.of(engine, run_id)
        state = resume(engine, config, console, local) or {}
        require_equal_replicas(engine)
        task = begin(engine)
        resume_companions(task.companions, state)
        task.restore(state)
        checkpoints = Checkpoints(engine, console, local, task.resumable_every, task.companions)
        guard = Guard(engine, run.path / "faults", console, state)
        consumed_samples = int(state.get("consumed_samples", 0))
        return Trainer(engine, task, run, console, checkpoints, guard, consumed_samples).run()
