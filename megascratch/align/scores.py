"""The rewards of a rollout: computed by all ranks together, summed with their weights, and what has none is told."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from rich.console import Console
from torch import Tensor

from megascratch.align.rewards import Answered, Reward, RewardError, Score
from megascratch.align.rollout import Question, Rollout
from megascratch.dist import comm
from megascratch.dist.mesh import Mesh

_SHOWN = 5


@runtime_checkable
class Judge(Protocol):
    """A reward that all ranks compute together: a model's."""

    name: str

    def judge(self, rollout: Rollout) -> list[Score]: ...


@dataclass(frozen=True)
class Scores:
    """What all rewards said of the completions of a rollout.

    Attributes:
        total: their weighted sum; NaN where one is missing, [n] float64.
        values: of each reward by its name, [n] float64.
        reasons: of missing ones: (completion, reward, why).
    """

    total: Tensor
    values: dict[str, Tensor]
    reasons: list[tuple[int, str, str]]

    def metrics(self) -> dict[str, float]:
        """Return what there is to log, under TRL's names."""
        known = self.total[~self.total.isnan()]
        found = {"reward": _mean(known), "rewards/missing": float(self.total.isnan().double().mean())}
        for name, values in self.values.items():
            some = values[~values.isnan()]
            found |= {
                f"rewards/{name}/mean": _mean(some),
                f"rewards/{name}/std": float(some.std()) if len(some) > 1 else 0.0,
            }
        return found

    def report(self, asked: Sequence[Question], first_sample: int, console: Console) -> None:
        """Tell which completions have no reward, and why."""
        if not self.reasons:
            return
        console.print(f"no reward for {int(self.total.isnan().sum())} of {len(self.total)} completions:")
        for i, name, why in self.reasons[:_SHOWN]:
            console.print(f"  sample {first_sample + i} ({asked[i].where}), {name}: {why}", markup=False)
        if len(self.reasons) > _SHOWN:
            console.print(f"  and {len(self.reasons) - _SHOWN} more")


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else math.nan


class Scorer:
    """Scores completions. Every rank makes one, and calls it with the same completions.

    Args:
        rewards: with their weights; all but a `Judge` are computed a part on each rank.
        mesh: whose ranks share the work.
        fails: whether a missing score ends the run.
    """

    def __init__(self, rewards: Sequence[tuple[Reward | Judge, float]], mesh: Mesh, fails: bool = False) -> None:
        self.rewards, self.mesh, self.fails = rewards, mesh, fails

    def __call__(self, answers: Sequence[Answered], rollout: Rollout) -> Scores:
        """Return the scores of all completions, given as text and as tokens.

        Raises: RewardError: on every rank, if one is missing and the recipe asks to end then.
        """
        total, values = torch.zeros(len(answers), dtype=torch.float64), {}
        reasons: list[tuple[int, str, str]] = []
        for reward, weight in self.rewards:
            scores = reward.judge(rollout) if isinstance(reward, Judge) else self._shared(reward, answers)
            values[reward.name] = torch.tensor([score.value for score in scores], dtype=torch.float64)
            total += weight * values[reward.name]
            reasons += [(i, reward.name, score.reason) for i, score in enumerate(scores) if math.isnan(score.value)]
        if reasons and self.fails:
            i, name, why = reasons[0]
            raise RewardError(f"completion {i} has no reward {name}: {why}; rollout.missing_score = skip goes on")
        return Scores(total, values, reasons)

    def _shared(self, reward: Reward, answers: Sequence[Answered]) -> list[Score]:
        """Have each rank compute every so-manieth score."""
        world = self.mesh.world
        own = reward(answers[world.rank :: world.size])
        said = json.dumps([[None if math.isnan(score.value) else score.value, score.reason] for score in own]).encode()
        scores: list[Score] = [Score(math.nan)] * len(answers)
        for rank, data in enumerate(comm.gather_bytes(said, world, self.mesh.device)):
            told: list[Any] = json.loads(data)
            scores[rank :: world.size] = [Score(math.nan if value is None else value, why) for value, why in told]
        return scores

    def close(self) -> None:
        """Let go of what the rewards hold."""
        for reward, _ in self.rewards:
            if not isinstance(reward, Judge):
                reward.close()
