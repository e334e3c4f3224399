"""The ways of training on conversations, by the verb of the command line that starts them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megascratch.align.conversations import demonstration, labelled, preference
from megascratch.align.dpo import preferences
from megascratch.align.examples import Reader
from megascratch.align.preference_losses import LABEL_LOSSES
from megascratch.align.reinforcement import grpo, ppo
from megascratch.align.reward import reward_model
from megascratch.align.sft import supervised
from megascratch.config import Config
from megascratch.engine import Method


@dataclass(frozen=True)
class Alignment:
    """A way of training.

    Attributes:
        open: starts it.
        reader: says what its records are read as; None where they are prompts, which nothing is learned from.
        head: what its model ends with.
    """

    open: Method
    reader: Callable[[Config], Reader] | None
    head: str = "vocabulary"


def _answers(config: Config) -> Reader:
    return labelled if config.dpo is not None and config.dpo.loss in LABEL_LOSSES else preference


METHODS: Mapping[str, Alignment] = MappingProxyType(
    {
        "sft": Alignment(supervised, lambda config: demonstration),
        "reward": Alignment(reward_model, lambda config: preference, head="scalar"),
        "dpo": Alignment(preferences, _answers),
        "ppo": Alignment(ppo, None),
        "grpo": Alignment(grpo, None),
    }
)
