"""A reward model as a judge of completions: its score of the last token, on the policy's layout."""

from pathlib import Path

import torch

from megascratch.align.rewards import Score
from megascratch.align.rollout import Rollout
from megascratch.align.rollout_rows import of_each_token
from megascratch.config import Config
from megascratch.config.check import check
from megascratch.dist.mesh import Mesh
from megascratch.engine import Engine
from megascratch.engine.state import load_weights
from megascratch.errors import CheckpointError, ConfigError, Problem
from megascratch.infer import read_config


class RewardModel:
    """Scores completions by a model. Every rank makes it, and calls it alike.

    Args:
        engine: with a scalar head, on the policy's layout; reads the policy's tokens.
        name: of the metric.
    """

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine, self.name = engine, name

    @classmethod
    def open(cls, checkpoint: Path, config: Config, mesh: Mesh, name: str) -> "RewardModel":
        """Return the reward model of a checkpoint.

        Args:
            checkpoint: of a reward model that speaks the policy's tokens.
            config: of the run, whose layout it takes.
            mesh: of the run.
            name: of the metric.

        Raises: CheckpointError: if it is no reward model, or has another vocabulary. ConfigError: if it does not
            divide over the layout.
        """
        model = read_config(checkpoint).model
        if model.head != "scalar":
            rule = "is no reward model: it predicts tokens"
            raise CheckpointError(Problem(str(checkpoint), rule, "give one that megascratch reward has made"))
        if model.vocab_size != config.model.vocab_size:
            rule = f"must be the policy's {config.model.vocab_size}: they read the same tokens"
            raise CheckpointError(Problem(f"model.vocab_size = {model.vocab_size}", rule), str(checkpoint))
        own = config.model_copy(update={"model": model, "lora": None})
        if problems := list(check(own, mesh.world.size)):
            raise ConfigError(problems, f"the layout, with the reward model {checkpoint}")
        engine = Engine(own, mesh, learns=False)
        load_weights(engine, checkpoint)
        return cls(engine, name)

    def judge(self, rollout: Rollout) -> list[Score]:
        """Return the score of each completion: of its last token, which has seen all of it."""
        scores = of_each_token(self.engine, rollout, lambda outputs, _: outputs.scores)
        last = scores[torch.arange(len(scores)), rollout.lengths - 1].tolist()
        return [Score(value) if value == value else Score(value, "the model gave NaN") for value in last]
