"""From a checkpoint to a model that is ready to run, and the tokenizer that belongs to it.

The checkpoint names logical tensors only, so the layout that trained it does not matter: each rank of tp asks for its
own extents.
"""

from pathlib import Path

import torch

from megascratch.checkpoint import Reader, find, load, weight_shards
from megascratch.config import Config, ParallelConfig
from megascratch.config.check import check
from megascratch.dist.mesh import Mesh
from megascratch.errors import CheckpointError, LayoutError, Problem, TokenizerError
from megascratch.nn import DTYPES, Placement, Stage, add_adapters, core_for
from megascratch.tokenizer import Tokenizer, formats

TOKENIZER = "tokenizer.json"


def load_model(checkpoint: Path, mesh: Mesh, dtype: torch.dtype | None = None) -> tuple[Stage, Config]:
    """Read a whole model, divided over the tp axis of a mesh.

    Args:
        checkpoint: a checkpoint, or a directory with `latest`.
        mesh: of tp ranks alone.
        dtype: of weights and activations; the one trained in when left out, but float32 for 16-bit models on a CPU,
            which computes faster in it and loses nothing.

    Returns: the model in evaluation mode, without gradients, and the configuration it was saved with.

    Raises:
        CheckpointError: if the checkpoint is missing, damaged or incomplete.
        LayoutError: if the model does not divide over tp.
    """
    directory = find(checkpoint)
    config = read_config(directory, mesh.spec.tp)
    if dtype is None:
        dtype = DTYPES[config.train.dtype]
        if mesh.device.type == "cpu" and dtype.itemsize == 2:
            dtype = torch.float32
    core = core_for(config.train.attention, mesh.device)
    # A single token cannot be divided along the sequence.
    stage = Stage(config.model, Placement(mesh.tp, False, dtype, mesh.device), core=core)
    if config.lora is not None:
        add_adapters(stage, config.lora)
    stage.eval().requires_grad_(False)
    for param in stage.parameters():
        param.zero_()  # padding, which no checkpoint holds
    load(directory, weight_shards(stage.parameters(), mesh), cast=True)
    return stage, config


def read_config(checkpoint: Path, tp: int = 1) -> Config:
    """Return the configuration that a checkpoint was saved with.

    Raises:
        CheckpointError: if the checkpoint is missing or damaged, or has none.
        LayoutError: if the model does not divide over tp ranks.
    """
    directory = find(checkpoint)
    config = Reader(directory).config()
    if config.model.vocab_size is None:
        raise CheckpointError(Problem("model.vocab_size", "is not in the configuration"), str(directory))
    layout = ParallelConfig(tp=tp, sequence_parallel=False)
    if problems := list(check(config.model_copy(update={"parallel": layout}))):
        raise LayoutError(problems, str(directory))
    return config


def open_tokenizer(checkpoint: Path, config: Config, given: Path | None = None) -> Tokenizer:
    """Open the tokenizer that a checkpoint was trained with.

    A copy near the checkpoint is preferred to the file that the recipe named, which may have moved or changed since.

    Args:
        checkpoint: a checkpoint, or a directory with `latest`.
        config: that it was saved with.
        given: what the user asked for instead.

    Raises: TokenizerError: if there is none, naming the places searched, or it has no use.
    """
    if given is not None:
        return formats.open_tokenizer(given)
    directory = find(checkpoint).resolve()
    run_directory = directory.parent.parent  # of <log.dir>/checkpoints/step_00001000, also after it was moved
    places = [directory / TOKENIZER, run_directory / TOKENIZER, Path(config.log.dir) / TOKENIZER]
    if config.data.tokenizer is not None:
        places.append(Path(config.data.tokenizer))
    for place in places:
        if place.exists():
            return formats.open_tokenizer(place)
    searched = [Problem(str(place), "no such file", "give the tokenizer: --tokenizer PATH") for place in places]
    raise TokenizerError(searched, f"the search for the tokenizer of {checkpoint}")
