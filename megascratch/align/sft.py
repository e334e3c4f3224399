"""Supervised fine-tuning: the next token, where it is the assistant's."""

from megascratch.align.conversations import demonstration
from megascratch.align.examples import read_examples
from megascratch.align.sources import keep_template, open_sets
from megascratch.config import Config
from megascratch.data.microbatch import Microbatch
from megascratch.dist.mesh import Mesh
from megascratch.engine import Begin, Engine, Loss, Outputs, Task, with_ahead
from megascratch.log import make_console
from megascratch.ops import acc_dtype


def supervised(config: Config, mesh: Mesh) -> Begin:
    """Read conversations, or prompts with completions.

    Raises: DataError, TokenizerError: if none can be used, or any cannot and the recipe is strict.
    """
    sets = open_sets(config, read_examples(config, demonstration, make_console(mesh.rank)))

    def begin(engine: Engine) -> Task:
        keep_template(config, mesh)
        return sets.task(config, mesh, completion_tokens)

    return begin


def completion_tokens(outputs: Outputs, microbatch: Microbatch) -> Loss:
    """Cross-entropy in nats a learned token, over the whole global batch; how often the model is right, its entropy."""
    mask = microbatch.loss_mask.to(acc_dtype(outputs.hidden))
    total, notes = outputs.described_cross_entropy(microbatch.labels, mask)
    metrics = {"mean_token_accuracy": (notes.hits * mask).sum(), "entropy": (notes.entropy * mask).sum()}
    return with_ahead(Loss(total, mask.sum(), metrics), outputs)
