"""Advantages, policy losses and divergences: values and gradients are verl's and TRL's, in fp32 to 1e-5."""

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from verl_arithmetic import verl_core_algos

from megascratch.align.advantages import BASELINES, gae, group_advantages, whiten
from megascratch.align.kl import KLControl, kl_estimate
from megascratch.align.policy_losses import (
    Clip,
    Sequences,
    importance_weights,
    policy_loss,
    sequence_log_ratio,
    token_weights,
    value_loss,
)

N, S, G = 8, 11, 4
ONE_A_ROW = Sequences(torch.zeros(N, S, dtype=torch.int64))


class Batch:
    """Random completions of different lengths, with what a policy, an older one and a reference say of them."""

    def __init__(self, seed: int = 0, holes: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator) * std

        lengths = torch.randint(2, S + 1, (N, 1), generator=generator)
        self.mask = (torch.arange(S) < lengths).float()
        if holes:  # turns that are not the policy's own
            self.mask *= (torch.rand(N, S, generator=generator) < 0.6).float()
            self.mask[:, 0] = 1.0
        self.old = -normal(N, S).abs() - 0.1
        self.logprobs = (self.old + normal(N, S, std=0.5)).requires_grad_()
        self.reference = self.old + normal(N, S, std=0.5)
        self.advantages, self.rewards = normal(N, S), normal(N, S) * self.mask
        self.values = normal(N, S).requires_grad_()
        self.old_values, self.returns = normal(N, S), normal(N, S)
        self.scores = torch.randint(0, 3, (N,), generator=generator).float() + normal(N, std=0.1)

    @property
    def log_ratio(self) -> Tensor:
        return self.logprobs - self.old


def mean(losses: Tensor, mask: Tensor, how: Any = "dapo") -> Tensor:
    """Return what the engine makes of a loss: the weighted sum over the number of tokens."""
    weights = token_weights(mask, how, max_tokens=S, micro_batch=2).to(losses.dtype)
    return (weights * losses).sum() / mask.sum()


def same(ours: Tensor, theirs: Tensor, leaf: Tensor) -> None:
    """Compare values and gradients."""
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5, abs=1e-6)
    (got,), (want,) = torch.autograd.grad(ours, leaf), torch.autograd.grad(theirs, leaf)
    assert want.abs().max() > 0
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5)])
def test_gae_is_verls(gamma: float, lam: float, holes: bool) -> None:
    batch, mask = Batch(holes=holes), Batch(holes=holes).mask
    values = batch.values.detach()
    theirs, their_returns = verl_core_algos().compute_gae_advantage_return(batch.rewards, values, mask, gamma, lam)
    advantages, returns = gae(batch.rewards, values, mask, gamma, lam)
    torch.testing.assert_close(returns, their_returns * mask, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whiten(advantages, mask), theirs * mask, rtol=1e-5, atol=1e-5)
    plain, _ = gae(batch.rewards, values, mask, gamma, lam, masked="plain")
    assert torch.allclose(plain, advantages) != holes, "the two differ between turns, and only there"


def test_plain_gae_is_the_textbooks() -> None:
    """TRL's PPO computes at masked tokens as anywhere, with the values set to 0."""
    batch = Batch(holes=True)
    values = (batch.values * batch.mask).detach().double()
    following = torch.cat((values[:, 1:], torch.zeros(N, 1)), dim=1)
    deltas = batch.rewards.double() + 0.9 * following - values
    expected = torch.stack([sum(0.45**k * deltas[:, t + k] for k in range(S - t)) for t in range(S)], dim=1)
    advantages, returns = gae(batch.rewards.double(), values, batch.mask, 0.9, 0.5, masked="plain")
    torch.testing.assert_close(advantages, expected * batch.mask)
    torch.testing.assert_close(returns, (expected + values) * batch.mask)


@pytest.mark.parametrize("masked", ["carry", "plain"])
def test_sequences_of_one_row_know_nothing_of_each_other(masked: Any) -> None:
    """Rows of two sequences each, the first of which ends with tokens that the policy did not choose."""
    batch = Batch(holes=True)
    mask = batch.mask * (torch.arange(S) < S - 2)

    def joined(x: Tensor) -> Tensor:
        return torch.cat((x[: N // 2], x[N // 2 :]), dim=1)

    documents = joined((torch.arange(N) >= N // 2).long().unsqueeze(1).expand(N, S))
    given = batch.rewards * mask, batch.values.detach(), mask
    alone = gae(*given, 0.9, 0.5, masked)
    together = gae(*map(joined, given), 0.9, 0.5, masked, documents)
    for got, want in zip(together, alone):
        torch.testing.assert_close(got, joined(want))
    leaked, _ = gae(*map(joined, given), 0.9, 0.5, masked)
    assert not torch.allclose(leaked, together[0])


def test_whitening_by_either_variance() -> None:
    batch = Batch()
    kept = batch.advantages[batch.mask > 0]
    for variance, correction in (("sample", 1), ("population", 0)):
        expected = (batch.advantages - kept.mean()) * torch.rsqrt(kept.var(correction=correction) + 1e-8) * batch.mask
        torch.testing.assert_close(whiten(batch.advantages, batch.mask, variance), expected)  # type: ignore[arg-type]
    kept_mean = whiten(batch.advantages, batch.mask, shift_mean=False)[batch.mask > 0].mean()
    assert kept_mean == pytest.approx(kept.mean().item(), rel=1e-4)


@pytest.mark.parametrize(("estimator", "theirs"), [("k1", "kl"), ("k2", "mse"), ("k3", "low_var_kl")])
def test_divergences_are_verls(estimator: Any, theirs: str) -> None:
    batch = Batch()
    batch.reference[0, 0], batch.reference[1, 1] = batch.old[0, 0] + 60, batch.old[1, 1] - 60  # where clamps matter
    expected = verl_core_algos().kl_penalty(batch.logprobs, batch.reference, theirs)
    ours = kl_estimate(batch.logprobs, batch.reference, estimator, "verl")
    same(mean(ours, batch.mask), mean(expected, batch.mask), batch.logprobs)
    assert kl_estimate(batch.logprobs, batch.reference, estimator, "openrlhf").abs().max() <= 10
    assert kl_estimate(batch.logprobs, batch.reference, estimator).abs().max() > 30


def test_the_adaptive_coefficient_is_verls() -> None:
    theirs, ours = verl_core_algos().AdaptiveKLController(0.2, 6.0, 1000), KLControl(0.2, 6.0, 1000)
    for kl in (1.0, 5.9, 6.1, 50.0):
        theirs.update(kl, 64)
        ours.update(kl, 64)
        assert ours.coefficient == pytest.approx(theirs.value, rel=1e-12)
    fixed = KLControl(0.2)
    fixed.update(50.0, 64)
    assert fixed.coefficient == 0.2


AGGREGATIONS = {"dapo": "token-mean", "grpo": "seq-mean-token-mean", "dr_grpo": "seq-mean-token-sum-norm"}


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("clip", [(0.2, 0.2), (0.1, 0.28)])
def test_the_policy_loss_is_verls(how: Any, clip: tuple[float, float]) -> None:
    batch, algos = Batch(), verl_core_algos()
    config = _VerlConfig(clip_ratio=0.2, clip_ratio_low=clip[0], clip_ratio_high=clip[1], clip_ratio_c=1.5)
    theirs, metrics = algos.compute_policy_loss_vanilla(
        batch.old, batch.logprobs, batch.advantages, batch.mask, AGGREGATIONS[how], config
    )
    ours = policy_loss(batch.log_ratio, batch.advantages, Clip(*clip, dual=1.5, log_ratio=20.0))
    same(mean(ours.losses, batch.mask, how), theirs, batch.logprobs)
    clipped = (ours.clipped_low | ours.clipped_high).float()
    assert mean(clipped, batch.mask).item() == pytest.approx(metrics["actor/pg_clipfrac"], rel=1e-5)
    assert mean(ours.clipped_dual.float(), batch.mask).item() == pytest.approx(metrics["actor/pg_clipfrac_lower"])
    assert metrics["actor/pg_clipfrac_lower"] > 0


class _VerlConfig(SimpleNamespace):
    """What verl reads of its ActorConfig."""

    global_batch_info: dict[str, Any] = {}  # noqa: RUF012

    def get(self, key: str, default: Any) -> Any:
        return getattr(self, key, default)


def test_sequence_ratios_are_verls() -> None:
    batch = Batch(holes=True)
    config = _VerlConfig(clip_ratio=0.2, clip_ratio_low=0.03, clip_ratio_high=0.04)
    theirs, _ = verl_core_algos().compute_policy_loss_gspo(
        batch.old, batch.logprobs, batch.advantages, batch.mask, "seq-mean-token-mean", config
    )
    ours = policy_loss(sequence_log_ratio(batch.log_ratio, batch.mask, ONE_A_ROW), batch.advantages, Clip(0.03, 0.04))
    same(mean(ours.losses, batch.mask, "grpo"), theirs, batch.logprobs)


@pytest.mark.parametrize("clip", [0.2, 1000.0])
def test_the_value_loss_is_verls(clip: float) -> None:
    batch = Batch()
    theirs, clipped = verl_core_algos().compute_value_loss(
        batch.values, batch.returns, batch.old_values, batch.mask, clip
    )
    ours, where = value_loss(batch.values, batch.old_values, batch.returns, clip)
    same(mean(ours, batch.mask), theirs, batch.values)
    assert mean(where.float(), batch.mask).item() == pytest.approx(clipped.item(), abs=1e-6)
    unclipped, _ = value_loss(batch.values, batch.old_values, batch.returns, None)
    assert torch.allclose(unclipped, ours) == (clip == 1000.0)


@pytest.mark.parametrize(
    ("name", "theirs", "options"),
    [
        ("verl", "compute_grpo_outcome_advantage", {}),
        ("dr_grpo", "compute_grpo_outcome_advantage", {"norm_adv_by_std_in_grpo": False}),
        ("rloo", "compute_rloo_outcome_advantage", {}),
    ],
)
def test_groups_are_compared_as_verl_does(name: str, theirs: str, options: dict[str, Any]) -> None:
    batch = Batch()
    token_rewards = torch.zeros(N, S)
    token_rewards[:, 1] = batch.scores
    index = np.repeat(np.arange(N // G), G)
    expected, _ = getattr(verl_core_algos(), theirs)(token_rewards, batch.mask, index, **options)
    ours = group_advantages(batch.scores, G, BASELINES[name])
    torch.testing.assert_close(ours.unsqueeze(1) * batch.mask, expected, rtol=1e-5, atol=1e-5)


def test_groups_by_hand() -> None:
    rewards = torch.tensor([1.0, 0, 0, 1, 2, 2, 2, 2])
    expected = {
        "trl": 0.5 / (0.5773503 + 1e-4),
        "megatron": 0.5 / (0.5 + 1e-4),
        "openrlhf": 0.5 / 0.5773503,
        "dr_grpo": 0.5,
        "rloo": 2 / 3,
    }
    for name, value in expected.items():
        ours = group_advantages(rewards, 4, BASELINES[name])
        torch.testing.assert_close(ours, value * torch.tensor([1.0, -1, -1, 1, 0, 0, 0, 0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BASELINES)
def test_a_reward_that_is_not_known_leaves_its_group_alone(name: str) -> None:
    known = group_advantages(torch.tensor([1.0, 0, 0.5]), 3, BASELINES[name])
    missing = group_advantages(torch.tensor([1.0, torch.nan, 0, 0.5]), 4, BASELINES[name])
    assert missing[1] == 0
    torch.testing.assert_close(missing[[0, 2, 3]], known)
    assert not group_advantages(torch.full((4,), torch.nan), 4, BASELINES[name]).any()


TRL_LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo"]


def _trl_loss(batch: Batch, rows: slice, **changes: Any) -> Tensor:
    """Return what TRL's GRPO makes of some rows, given the log-probabilities that a model would give."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    options = {"loss_type": "grpo", "level": "token", "beta": 0.0, "epsilon": (0.2, 0.2), "ratio": None, **changes}
    logprobs = batch.logprobs[rows]
    trainer = mock_trainer(options, lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None))
    inputs = {
        "prompt_ids": torch.zeros(len(logprobs), 1, dtype=torch.int64),
        "prompt_mask": torch.ones(len(logprobs), 1),
        "completion_ids": torch.zeros(len(logprobs), S, dtype=torch.int64),
        "completion_mask": batch.mask[rows],
        "advantages": batch.advantages[rows, 0],
        "old_per_token_logps": batch.old[rows],
        "ref_per_token_logps": batch.reference[rows],
        "importance_sampling_ratio": options["ratio"] if options["ratio"] is None else options["ratio"][rows],
        "num_items_in_batch": batch.mask.sum(),
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


def mock_trainer(options: dict[str, Any], logprobs: Callable[..., Any]) -> Any:
    """Return the attributes that TRL's loss reads of its trainer."""
    identity = SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, **_: x, gather_for_metrics=lambda x: x
    )
    args = SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=logprobs,
        accelerator=identity,
        args=args,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=options["level"],
        beta=options["beta"],
        loss_type=options["loss_type"],
        epsilon_low=options["epsilon"][0],
        epsilon_high=options["epsilon"][1],
        use_vllm=options["ratio"] is not None,
        vllm_importance_sampling_correction=True,
        max_completion_length=S,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )


def _our_grpo_loss(batch: Batch, how: Any, clip: Clip = Clip(), beta: float = 0.0, sequences: bool = False) -> Tensor:
    log_ratio = sequence_log_ratio(batch.log_ratio, batch.mask, ONE_A_ROW) if sequences else batch.log_ratio
    losses = policy_loss(log_ratio, batch.advantages[:, :1].expand(N, S), clip).losses
    return mean(losses + beta * kl_estimate(batch.logprobs, batch.reference, "k3"), batch.mask, how)


@pytest.mark.parametrize("how", TRL_LOSSES)
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_the_grpo_family_is_trls(how: str, beta: float) -> None:
    batch = Batch()
    if how == "bnpo":  # of micro-batches of 2, as four accumulated steps
        theirs = sum(_trl_loss(batch, slice(i, i + 2), loss_type=how, beta=beta) for i in range(0, N, 2)) / 4
    else:
        theirs = _trl_loss(batch, slice(None), loss_type=how, beta=beta)
    same(_our_grpo_loss(batch, how, beta=beta), theirs, batch.logprobs)


def test_dapos_asymmetric_clip_is_trls() -> None:
    batch = Batch()
    theirs = _trl_loss(batch, slice(None), loss_type="dapo", epsilon=(0.2, 0.28))
    same(_our_grpo_loss(batch, "dapo", Clip(0.2, 0.28)), theirs, batch.logprobs)


@pytest.mark.parametrize("how", ["grpo", "dapo", "dr_grpo"])
def test_sequence_ratios_are_trls(how: str) -> None:
    """TRL's ratio of a sequence has the gradient of all its tokens; ours has each token's own: the sums are equal."""
    batch = Batch()
    theirs = _trl_loss(batch, slice(None), loss_type=how, level="sequence", epsilon=(0.03, 0.04))
    same(_our_grpo_loss(batch, how, Clip(0.03, 0.04), sequences=True), theirs, batch.logprobs)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_truncated_importance_weights(level: str) -> None:
    batch, cap = Batch(), 1.3
    together = ONE_A_ROW if level == "sequence" else None
    weights = importance_weights(batch.old, batch.reference, batch.mask, cap, together)
    difference = (batch.old - batch.reference) * batch.mask
    expected = difference.exp() if level == "token" else difference.sum(1, keepdim=True).exp().expand(N, S)
    torch.testing.assert_close(weights, expected.clamp(max=cap))
    assert (weights == cap).any() and (weights < 1).any()
    theirs = _trl_loss(batch, slice(None), loss_type="dapo", ratio=weights)
    losses = policy_loss(batch.log_ratio, batch.advantages[:, :1].expand(N, S)).losses
    same(mean(losses * weights, batch.mask), theirs, batch.logprobs)


def test_empty_sequences_count_as_libraries_count_them() -> None:
    """A mean of means leaves them out (verl); `dr_grpo` divides by all sequences (TRL)."""
    mask = torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 0]])
    losses = torch.tensor([[1.0, 3, 9, 9], [9, 9, 9, 9]])
    for how, expected in (("grpo", 2.0), ("dapo", 2.0), ("dr_grpo", 4 / 8), ("bnpo", 2.0)):
        weights = token_weights(mask, how, max_tokens=4, micro_batch=2)  # type: ignore[arg-type]
        assert ((weights * losses).sum() / mask.sum()).item() == pytest.approx(expected), how
