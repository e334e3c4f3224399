"""PPO: a policy, a critic that predicts its rewards, and a frozen reference that it is kept near to.

    score of the completion ───────────────────────────┐ at its last token
    −β · (log π_old − log π_ref) of each token ────────┴─► rewards ─ critic's values ─ GAE ─► advantages, returns
                                                                                               policy     critic

The critic is an engine of its own, on the policy's layout, with a scalar head, and is saved in the same checkpoint. It
learns from each batch right after the policy; but where the first batch is all of a rollout, in the pass that gives its
values:

    several batches    values ─ advantages ─ policy, critic ─ policy, critic ─ …
    one                values and critic ─ advantages ─ policy ─ policy, critic ─ …        a pass less
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megascratch.align.advantages import gae, whiten
from megascratch.align.kl import KLControl, kl_estimate
from megascratch.align.policy import PolicyObjective, ValueObjective, logprobs_at
from megascratch.align.policy_losses import Clip
from megascratch.align.rollout import Rollout, needs_old
from megascratch.align.rollout_rows import by_completion, of_each_token, step_microbatches
from megascratch.config import Config
from megascratch.data.microbatch import Microbatch
from megascratch.engine import Engine, StepReport


def ppo_objective(config: Config) -> PolicyObjective:
    """Return what a recipe's [ppo] has the policy minimise."""
    ppo, rollout = config.ppo, config.rollout
    assert rollout is not None
    return PolicyObjective(
        rollout.temperature,
        Clip(ppo.clip_low, ppo.clip_high, ppo.dual_clip, ppo.log_ratio_clamp),
        importance_cap=rollout.importance_cap,
        importance_level=rollout.importance_level,
    )


class ActorCritic:
    """Weighs tokens by what the critic did not expect, and teaches it.

    Args:
        policy: in training.
        critic: in training beside it, with a scalar head.
        reference: frozen.
    """

    def __init__(self, policy: Engine, critic: Engine, reference: Engine) -> None:
        assert policy.config.rollout is not None
        self.policy, self.critic, self.reference = policy, critic, reference
        self.config, self.rollout = policy.config.ppo, policy.config.rollout
        self.control = KLControl(self.config.kl_coeff, self.config.kl_target, self.config.kl_horizon)
        self.value_objective = ValueObjective(
            self.config.value_clip, self.config.gamma, self.config.lam, self.config.gae_masked
        )
        self.needs_old = needs_old(policy.config)
        self._is_taught = False  # whether the critic has learned what the policy is about to

    def state(self) -> dict[str, Any]:
        """Return what the next rollout depends on besides engines."""
        return {"kl_coeff": self.control.coefficient}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` said; a new run has none."""
        self.control.coefficient = float(state.get("kl_coeff", self.control.coefficient))

    def prepare(self, rollout: Rollout) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return advantages and returns, and what they were made from."""
        ppo, temperature, mask = self.config, self.rollout.temperature, rollout.mask.double()
        old = rollout.sampled
        if self.needs_old:
            old = of_each_token(self.policy, rollout, lambda o, m: logprobs_at(o, m, temperature))
        reference = of_each_token(self.reference, rollout, lambda o, m: logprobs_at(o, m, temperature))
        divergence = kl_estimate(old, reference, ppo.kl_estimator, ppo.kl_clamp) * mask
        penalties = -self.control.coefficient * divergence
        rewards = penalties + _at_the_end(rollout) * mask
        if ppo.whiten_rewards:
            rewards = whiten(rewards, mask, ppo.whiten_variance, shift_mean=False)
        values, taught = self._values(rollout, rewards)
        advantages, returns = gae(rewards, values, mask, ppo.gamma, ppo.lam, ppo.gae_masked)
        if ppo.whiten_advantages:
            advantages = whiten(advantages, mask, ppo.whiten_variance)
        counts = mask.sum(1) > 0
        kl = float(((old - reference) * mask).sum(1)[counts].mean()) if counts.any() else 0.0
        metrics = self._metrics(rollout, kl, float(penalties.sum(1)[counts].mean()) if counts.any() else 0.0)
        metrics |= {"val/explained_variance": _explained(values, returns, mask), **taught}
        if counts.any():
            self.control.update(kl, int(counts.sum()))
        tensors = {"advantages": advantages, "returns": returns, "values": values}
        return {**tensors, "old": old} if self.needs_old else tensors, metrics

    def after_step(self, microbatches: list[Microbatch], report: StepReport) -> tuple[dict[str, float], bool]:
        """Teach the critic what it has not learned yet, and say whether the policy has moved far enough."""
        taught = {} if self._is_taught else _noted(self.critic.train_step(microbatches, self.value_objective))
        self._is_taught = False
        stop = self.config.stop_kl
        return taught, stop is not None and report.metrics["policy/approxkl_avg"] > stop

    def _values(self, rollout: Rollout, rewards: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Return the critic's values [n, s], and what there is to log if it learned in the pass that gave them."""
        if self.needs_old or not rollout.mask.any():
            return of_each_token(self.critic, rollout, lambda o, _: o.scores) * rollout.mask, {}
        everyone = torch.arange(len(rollout.tokens))
        microbatches = step_microbatches(self.critic, rollout, everyone, self.config.aggregation, {"rewards": rewards})
        report = self.critic.train_step(microbatches, self.value_objective, keep="values")
        self._is_taught = True
        return by_completion(self.critic, rollout, microbatches, report.kept) * rollout.mask, _noted(report)

    def _metrics(self, rollout: Rollout, kl: float, penalty: float) -> dict[str, float]:
        """Return what there is to log, under the names of TRL's PPO; means over the completions that count."""
        score = float(rollout.rewards.nanmean())
        return {
            "objective/kl": kl,
            "objective/entropy": float(-rollout.sampled.sum(1).mean()),
            "objective/non_score_reward": penalty,
            "objective/scores": score,
            "objective/rlhf_reward": score + penalty,
            "objective/kl_coef": self.control.coefficient,
            "val/num_eos_tokens": float(sum(completion.stopped for completion in rollout.completions)),
        }


def _noted(report: StepReport) -> dict[str, float]:
    """Return what there is to log of a step of the critic."""
    return {"loss/value_avg": report.loss, "critic/grad_norm": report.grad_norm, **report.metrics}


def _at_the_end(rollout: Rollout) -> Tensor:
    """Return each completion's reward at the place that its last token was chosen at, [n, s]."""
    rewards = torch.zeros_like(rollout.sampled)
    rewards[torch.arange(len(rewards)), rollout.lengths - 2] = rollout.rewards.nan_to_num(0.0)
    return rewards


def _explained(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """Return what share of the returns' variance the critic explains; 1 is all, 0 a constant's."""
    kept = mask > 0
    variance = returns[kept].var(correction=0) if kept.any() else torch.zeros(())
    return float(1 - (returns - values)[kept].var(correction=0) / variance) if variance > 0 else 0.0
