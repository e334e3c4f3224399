"""Recipes, data and launches that do not fit: told before any work starts."""

import os
import socket
from pathlib import Path

import numpy as np
from fault_table import EXACT, fault
from ground import Ground
from tiny_run import write_corpus

from megascratch.checkpoint import load
from megascratch.checkpoint.load import Reader, tensor_shard
from megascratch.config import load_config
from megascratch.data.writer import IndexedDatasetWriter
from megascratch.dist.launch import Environment, environment, process_group
from megascratch.dist.testing import run_ranks
from megascratch.engine import pretrain

RECIPE, DATA, LAUNCH = "Recipes", "Data", "Launching"
TINY = "model.preset=tiny"


def agree_on(differing_rank: int, name: str) -> str:
    """Compare recipes of two ranks, one of which has another value; return what they raise."""
    import torch

    from megascratch.dist.agreement import require_agreement
    from megascratch.dist.mesh import Mesh, MeshSpec
    from megascratch.errors import LayoutError

    mesh = Mesh.create(MeshSpec(dp=2), torch.device("cpu"))
    facts = {"train": {"seed": 1234}, "its code": "a1", "data": {"paths": ["a"]}}
    if mesh.rank == differing_rank:
        facts = {**facts, name: "b2" if name == "its code" else {"seed": 7}}
    try:
        require_agreement(facts, mesh.world)
    except LayoutError as error:
        return str(error)
    return ""


@fault(RECIPE, "a misspelt key", "train.stesp is not a known key did you mean steps?")
def misspelt(ground: Ground) -> str:
    return ground.said_by(lambda: load_config(None, [TINY, "train.stesp=3"]))


@fault(RECIPE, "a value of another type", "train.steps = 'many' … integer")
def wrong_type(ground: Ground) -> str:
    return ground.said_by(lambda: load_config(None, [TINY, "train.steps=many"]))


@fault(RECIPE, "a layout that does not divide the model", "parallel.tp = 3 must divide model.n_heads = … use …")
def indivisible(ground: Ground) -> str:
    return ground.said_by(lambda: load_config(None, [TINY, "parallel.tp=3"]))


@fault(RECIPE, "two mistakes at once", "2 problems in … parallel.tp = 3 … optim.warmup_steps = 900 …")
def two_mistakes(ground: Ground) -> str:
    overrides = [TINY, "parallel.tp=3", "optim.warmup_steps=900", "train.steps=10"]
    return ground.said_by(lambda: load_config(None, overrides))


@fault(RECIPE, "a recipe that is not there", "nowhere.toml no such recipe give the path of a TOML file")
def no_recipe(ground: Ground) -> str:
    return ground.said_by(lambda: load_config(Path("nowhere.toml"), []))


@fault(RECIPE, "a period that is neither steps nor minutes", "checkpoint.every … = 'soon' …")
def bad_period(ground: Ground) -> str:
    return ground.said_by(lambda: load_config(None, [TINY, "checkpoint.every=soon"]))


@fault(RECIPE, "local copies without a place", "checkpoint.local_every = 5 needs checkpoint.local_dir, on the node")
def no_local_dir(ground: Ground) -> str:
    return ground.said_by(lambda: load_config(None, [TINY, "checkpoint.local_every=5"]))


@fault(
    RECIPE,
    "a checkpoint of another model",
    "model.hidden = 16 must be 32, as in the checkpoint use the checkpoint's value",
)
def other_model(ground: Ground) -> str:
    ground.stopped()
    return ground.said_by(lambda: pretrain(ground.config(model={"hidden": 16}), None))


@fault(
    RECIPE,
    "a tensor of another shape",
    "tensor embed.weight has shape [64, 32] in the checkpoint, the model has [65, 32]",
)
def other_shape(ground: Ground) -> str:
    path = ground.stopped()
    record = Reader(path).manifest.tensors["embed.weight"].model_copy(update={"shape": (65, 32)})
    import torch

    shard = tensor_shard("embed.weight", record, (slice(0, 65), slice(0, 32)), torch.float32)
    return ground.said_by(lambda: load(path, [shard]))


@fault(
    RECIPE, "a checkpoint that is not there", "nowhere does not exist give a checkpoint, or a directory of checkpoints"
)
def no_checkpoint(ground: Ground) -> str:
    config = ground.config(checkpoint={"load": str(ground.folder / "nowhere")})
    return ground.said_by(lambda: pretrain(config, None))


@fault(
    LAUNCH,
    "a rank with another recipe",
    "rank 1: train.seed = 7 must be 1234, as on rank 0 start every rank with the same recipe and code",
)
def other_recipe(ground: Ground) -> str:
    return run_ranks(2, agree_on, 1, "train")[0]


@fault(LAUNCH, "a rank that runs other code", "rank 1: its code = b2 must be a1, as on rank 0")
def other_code(ground: Ground) -> str:
    return run_ranks(2, agree_on, 1, "its code")[1]


@fault(
    LAUNCH,
    "a number of ranks that the layout does not divide",
    "world size = 3 must divide by tp 2 × pp 1 × cp 1 = 2 start 2 or 4 ranks",
)
def wrong_world(ground: Ground) -> str:
    return ground.said_by(lambda: load_config(None, [TINY, "parallel.tp=2"], world_size=3))


@fault(LAUNCH, "a rank outside of the world", "RANK=4, WORLD_SIZE=2, … must name this process's rank in the world")
def wrong_rank(ground: Ground) -> str:
    return ground.said_by(lambda: environment({"RANK": "4", "WORLD_SIZE": "2"}))


@fault(LAUNCH, "srun without a place to meet", "MASTER_ADDR, MASTER_PORT must be exported for srun without torchrun")
def no_master(ground: Ground) -> str:
    return ground.said_by(lambda: environment({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}))


@fault(
    LAUNCH,
    "the port that ranks are to meet at is taken",
    "MASTER_PORT = … is in use by another program set it to a free port",
)
def port_taken(ground: Ground) -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ground.monkeypatch.setitem(os.environ, "MASTER_ADDR", "127.0.0.1")
        ground.monkeypatch.setitem(os.environ, "MASTER_PORT", str(taken.getsockname()[1]))

        def join() -> None:
            with process_group(Environment(0, 2, 0, 2), timeout_s=5):
                pass

        return ground.said_by(join)


@fault(
    DATA,
    "the dataset is replaced while a run is stopped",
    "data.paths = … are not those that this run was trained on so far",
)
def replaced(ground: Ground) -> str:
    ground.stopped()
    (ground.folder / "other").mkdir()
    other = ground.folder / "other/counting"
    with IndexedDatasetWriter(other, np.dtype(np.uint16)) as writer:
        for start in range(200):
            writer.add_document((start + 2 * np.arange(50)) % 64, [50])
    config = ground.config(data={"paths": [str(other)]})
    return ground.said_by(lambda: pretrain(config, None))


@fault(DATA, "the same dataset moved elsewhere while a run is stopped", EXACT)
def moved(ground: Ground) -> str:
    ground.stopped()
    (ground.folder / "there").mkdir()
    return ground.resumes(ground.config(data={"paths": [str(write_corpus(ground.folder / "there"))]}))


def spoilt(ground: Ground, suffix: str, size: int) -> str:
    """Cut a file of a dataset to a length, and return what opening it says."""
    prefix = write_corpus(ground.folder)
    os.truncate(f"{prefix}{suffix}", size)
    return ground.said_by(lambda: pretrain(ground.config(data={"paths": [str(prefix)]}), None))


@fault(DATA, "a truncated .bin", "counting.bin … bytes …")
def short_bin(ground: Ground) -> str:
    return spoilt(ground, ".bin", 100)


@fault(DATA, "a truncated .idx", "counting.idx …")
def short_idx(ground: Ground) -> str:
    return spoilt(ground, ".idx", 60)


@fault(DATA, "a dataset that is not there", "nothing.bin no such file")
def no_data(ground: Ground) -> str:
    config = ground.config(data={"paths": [str(ground.folder / "nothing")]})
    return ground.said_by(lambda: pretrain(config, None))


@fault(
    DATA, "token ids outside of the vocabulary", "token id 63 in document … must be 0 to 62, as model.vocab_size = 63"
)
def large_id(ground: Ground) -> str:
    return ground.said_by(lambda: pretrain(ground.config(model={"vocab_size": 63}), None))


@fault(DATA, "too little data for one sample", "not enough for one sample of data.seq_length + 1 = 9,001 tokens")
def too_little(ground: Ground) -> str:
    config = ground.config(data={"seq_length": 9000}, model={"max_seq_length": 9000})
    return ground.said_by(lambda: pretrain(config, None))
