"""What reinforcement learning minimises on the engine: the policy's clipped loss, and the critic's.

    of_tokens     advantages   what a token brought, beyond what was expected
                  weights      what it counts (`policy_losses.token_weights`)
                  sampled      log-probability that the sampler chose it by
                  old          log-probability under the policy as it was then; the policy's own where left out, so that
                               the ratio is exactly 1
                  reference    log-probability under the reference; for a divergence in the loss

The loss's weight is the number of tokens that count, so that every metric is a mean over them. Logits are divided by
the temperature that the tokens were sampled at: it is that distribution which is improved.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megascratch.align.advantages import gae
from megascratch.align.kl import Clamp, Estimator, kl_estimate
from megascratch.align.policy_losses import (
    Clip,
    Sequences,
    importance_weights,
    policy_loss,
    sequence_log_ratio,
    value_loss,
)
from megascratch.data.microbatch import Microbatch
from megascratch.engine import Loss, Outputs
from megascratch.ops import acc_dtype

_CLIP = Clip()


def at_temperature(outputs: Outputs, temperature: float) -> Outputs:
    """Return outputs whose logits are divided by a temperature."""
    if temperature == 1.0:
        return outputs
    softcap = None if outputs.softcap is None else outputs.softcap / temperature
    return replace(outputs, hidden=outputs.hidden / temperature, softcap=softcap)


def logprobs_at(outputs: Outputs, microbatch: Microbatch, temperature: float) -> Tensor:
    """Return the log-probability of each label that counts, [b, s], where logits are divided by a temperature."""
    return at_temperature(outputs, temperature).logprobs(microbatch.labels, microbatch.loss_mask)


@dataclass(frozen=True)
class KLPenalty:
    """A divergence from the reference, in the loss.

    Attributes:
        coefficient: of the estimate at each token.
        estimator, clamp: see `kl.kl_estimate`.
    """

    coefficient: float
    estimator: Estimator = "k3"
    clamp: Clamp = "none"


@dataclass(frozen=True)
class PolicyObjective:
    """The clipped loss of a policy, with the metrics that belong to it.

    Attributes:
        temperature: of sampling.
        clip: where a ratio stops to matter.
        ratio: of each token, or one of its whole sequence (GSPO).
        penalty: in the loss, or None.
        importance_cap: of the weights between sampler and trainer; None for no weights.
        importance_level: of each token, or of its whole sequence.
    """

    temperature: float = 1.0
    clip: Clip = _CLIP
    ratio: Literal["token", "sequence"] = "token"
    penalty: KLPenalty | None = None
    importance_cap: float | None = None
    importance_level: Literal["token", "sequence"] = "token"

    def __call__(self, outputs: Outputs, microbatch: Microbatch) -> Loss:
        """Return the loss of a micro-batch."""
        dtype = acc_dtype(outputs.hidden)
        of = {name: x.to(dtype) for name, x in microbatch.of_tokens.items()}
        mask = microbatch.loss_mask.to(dtype)
        scaled = at_temperature(outputs, self.temperature)
        logprobs, notes = scaled.described_logprobs(microbatch.labels, mask)
        old = of.get("old", logprobs.detach())
        log_ratio = (logprobs - old) * mask
        per_token = log_ratio
        sequences = Sequences(microbatch.documents, microbatch.of_samples["present"].shape[1], outputs.cp)
        if self.ratio == "sequence":
            log_ratio = sequence_log_ratio(log_ratio, mask, sequences)
        policy = policy_loss(log_ratio, of["advantages"], self.clip)
        losses, sums = policy.losses, self._metrics(policy.clipped_low, policy.clipped_high, per_token, mask)
        sums["entropy"] = sums["policy/entropy_avg"] = (notes.entropy * mask).sum()
        if "sampled" in of:
            losses = losses * self._importance(old, of["sampled"], mask, sequences, sums)
        sums["loss/policy_avg"] = (losses.detach() * of["weights"]).sum()
        if self.penalty is not None:
            p = self.penalty
            divergence = kl_estimate(logprobs, of["reference"], p.estimator, p.clamp) * mask
            losses = losses + p.coefficient * divergence
            sums["kl"] = divergence.sum()
        of_tokens = {"logprobs": logprobs.detach()}
        return Loss((losses * of["weights"]).sum(), mask.sum(), sums, of_tokens=of_tokens)

    def _metrics(self, low: Tensor, high: Tensor, log_ratio: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return sums over tokens: how many were clipped where, and how far the policy has moved."""
        moved = log_ratio.detach()
        return {
            "clip_ratio/low_mean": (low * mask).sum(),
            "clip_ratio/high_mean": (high * mask).sum(),
            "clip_ratio/region_mean": ((low | high) * mask).sum(),
            "policy/clipfrac_avg": ((low | high) * mask).sum(),
            "policy/approxkl_avg": (moved.square() / 2 * mask).sum(),
            "val/ratio": (moved.exp() * mask).sum(),
        }

    def _importance(
        self, old: Tensor, sampled: Tensor, mask: Tensor, sequences: Sequences, sums: dict[str, Tensor]
    ) -> Tensor:
        """Return the weights between sampler and trainer, [b, s], and note how far the two are apart."""
        sums["sampling/sampling_logp_difference/mean"] = ((old - sampled) * mask).detach().abs().sum()
        if self.importance_cap is None:
            return torch.ones_like(mask)
        together = sequences if self.importance_level == "sequence" else None
        weights = importance_weights(old, sampled, mask, self.importance_cap, together)
        sums["sampling/importance_sampling_ratio/mean"] = (weights * mask).sum()
        return weights


@dataclass(frozen=True)
class ValueObjective:
    """Half the square of the critic's error.

    `of_tokens` has `values` of when the tokens were sampled, and `returns`. Where it has `rewards` instead, the batch
    is all of a rollout, which the critic has not learned from yet: its own values are those of before, and what they
    estimate of the returns comes from the very pass that learns.

    Attributes:
        clip: how far a value may move from the old one; None: as far as it will.
        gamma, lam, masked: see `advantages.gae`.
    """

    clip: float | None = 0.2
    gamma: float = 1.0
    lam: float = 0.95
    masked: Literal["carry", "plain"] = "carry"

    def __call__(self, outputs: Outputs, microbatch: Microbatch) -> Loss:
        """Return the loss of a micro-batch."""
        values = outputs.scores
        of = {name: x.to(values.dtype) for name, x in microbatch.of_tokens.items()}
        mask = microbatch.loss_mask.to(values.dtype)
        if "rewards" in of:
            old, returns = values.detach(), self._returns(outputs, microbatch)
        else:
            old, returns = of["values"], of["returns"]
        losses, clipped = value_loss(values, old, returns, self.clip)
        total = (losses * of["weights"]).sum()
        of_tokens = {"values": values.detach()}
        return Loss(total, mask.sum(), {"val/clipfrac_avg": (clipped * mask).sum()}, of_tokens=of_tokens)

    def _returns(self, outputs: Outputs, microbatch: Microbatch) -> Tensor:
        """Return what the values and rewards make of the returns, [b, s] of this rank's tokens."""
        of_tokens = outputs.scores, microbatch.of_tokens["rewards"], microbatch.loss_mask, microbatch.documents
        values, rewards, mask, documents = map(outputs.whole_sequences, of_tokens)
        _, returns = gae(rewards, values.double(), mask, self.gamma, self.lam, self.masked, documents)
        return outputs.own_tokens(returns).to(outputs.scores.dtype)
