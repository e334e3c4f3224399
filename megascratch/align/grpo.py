"""GRPO and its variants: completions of one prompt are each other's measure, and no critic is needed.

    rewards of a group    1 0 0 1    ─ baseline ─►    advantages 0.87 −0.87 −0.87 0.87, the same for all their tokens

A group whose rewards are all equal teaches nothing; how many are is a metric (`frac_reward_zero_std`).
"""

import torch
from torch import Tensor

from megascratch.align.advantages import BASELINES, group_advantages
from megascratch.align.policy import KLPenalty, PolicyObjective, logprobs_at
from megascratch.align.policy_losses import Clip
from megascratch.align.rollout import Rollout, needs_old
from megascratch.align.rollout_rows import of_each_token
from megascratch.config import Config
from megascratch.data.microbatch import Microbatch
from megascratch.engine import Engine, StepReport


def grpo_objective(config: Config) -> PolicyObjective:
    """Return what a recipe's [grpo] minimises."""
    grpo, rollout = config.grpo, config.rollout
    assert rollout is not None
    penalty = KLPenalty(grpo.kl_coeff, grpo.kl_estimator, grpo.kl_clamp) if grpo.kl_coeff > 0 else None
    return PolicyObjective(
        rollout.temperature,
        Clip(grpo.clip_low, grpo.clip_high, grpo.dual_clip, grpo.log_ratio_clamp),
        grpo.ratio,
        penalty,
        rollout.importance_cap,
        rollout.importance_level,
    )


class GroupLearner:
    """Compares the completions of a prompt.

    Args:
        policy: in training.
        reference: whose distance is in the loss, or None.
    """

    def __init__(self, policy: Engine, reference: Engine | None = None) -> None:
        assert policy.config.rollout is not None
        self.policy, self.reference = policy, reference
        self.config, self.rollout = policy.config.grpo, policy.config.rollout
        self.needs_old = needs_old(policy.config)

    def prepare(self, rollout: Rollout) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return the advantages, and the log-probabilities that the loss needs."""
        g, temperature = self.rollout.samples, self.rollout.temperature
        advantages = group_advantages(rollout.rewards, g, BASELINES[self.config.baseline])
        tensors = {"advantages": advantages.unsqueeze(1) * rollout.mask}
        if self.needs_old:
            tensors["old"] = of_each_token(self.policy, rollout, lambda o, m: logprobs_at(o, m, temperature))
        if self.reference is not None:
            tensors["reference"] = of_each_token(self.reference, rollout, lambda o, m: logprobs_at(o, m, temperature))
        spread = _group_std(rollout.rewards.view(-1, g))
        equal = torch.isclose(spread, torch.zeros_like(spread))
        return tensors, {"reward_std": float(spread.mean()), "frac_reward_zero_std": float(equal.double().mean())}

    def after_step(self, microbatches: list[Microbatch], report: StepReport) -> tuple[dict[str, float], bool]:
        """Learn nothing more."""
        return {}, False


def _group_std(rewards: Tensor) -> Tensor:
    """Return the standard deviation of each group [n/g, g] without its missing rewards, 0 of fewer than two."""
    known = ~rewards.isnan()
    count = known.sum(1)
    seen = rewards.nan_to_num(0.0)
    centred = (seen - (seen.sum(1) / count.clamp(min=1)).unsqueeze(1)) * known
    return (centred.square().sum(1) / (count - 1).clamp(min=1)).sqrt()
