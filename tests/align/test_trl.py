"""Losses, metrics and gradients against TRL's own trainers: same model, batch and reference, to 1e-5 in float32.

Our side packs all answers into rows; theirs pads them. So this also holds packing to what no packing computes.
"""

from collections import defaultdict
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from hf_twin import assert_same_gradients, make_stage, outputs_of, padded, random_examples, twin_of
from torch import Tensor
from trl import DPOTrainer, KTOTrainer, RewardTrainer, SFTTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.utils import add_fused_lm_head

from megascratch.align.dpo import pair_objective, with_pairs_per_token
from megascratch.align.examples import _scored
from megascratch.align.kto import _drift, _with_drift, label_objective, mismatched
from megascratch.align.pairs import answer_logprobs
from megascratch.align.preference_losses import PAIR_LOSSES, Ratios
from megascratch.align.reward import score_objective
from megascratch.align.rows import Rows, collate_rows
from megascratch.align.sft import completion_tokens
from megascratch.config import DpoConfig, RewardConfig
from megascratch.data.microbatch import Microbatch
from megascratch.dist.mesh import Mesh
from megascratch.engine import Loss

FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def _trainer(model: Any, **attributes: Any) -> MagicMock:
    """Return what stands for one of their trainers: the attributes that its loss reads."""
    trainer = MagicMock()
    trainer.model, trainer._metrics, trainer.aux_loss_enabled = model, defaultdict(lambda: defaultdict(list)), False
    trainer._total_train_tokens, trainer._tp_size, trainer.accelerator.num_processes = 0, 1, 1
    trainer.accelerator.device = torch.device("cpu")
    trainer.accelerator.gather = trainer.accelerator.gather_for_metrics = lambda x: x
    for name, value in attributes.items():
        setattr(trainer, name, value)
    return trainer


def _batch(examples: Any, sizes: Any = None) -> Microbatch:
    """All examples in packed rows of one micro-batch; some rows hold fewer than others."""
    rows = Rows(examples, 40, packing=True, seed=None, sizes=sizes)
    batch = collate_rows(rows, range(rows.epoch_samples))
    assert len(batch.tokens) > 1 and batch.of_samples["present"].min() == 0
    return batch


def _with_reference(batch: Microbatch, reference: Tensor) -> Microbatch:
    """Give each answer, by its number, the reference's log-probability."""
    of_samples = {**batch.of_samples, "reference": reference[batch.of_samples["answer"]]}
    return Microbatch(**{**vars(batch), "of_samples": of_samples})


def _mean(loss: Loss) -> Tensor:
    return loss.total / loss.weight


def _metric(loss: Loss, name: str) -> float:
    value = loss.metrics[name]
    if isinstance(value, tuple):
        return (value[0] / value[1]).item()
    return (value / loss.weight).item()


def _assert_same_metrics(loss: Loss, theirs: Any, names: tuple[str, ...]) -> None:
    for name in names:
        assert _metric(loss, name) == pytest.approx(theirs[name][-1], rel=1e-4, abs=1e-5), name


def test_sft() -> None:
    stage, examples = make_stage(), random_examples(7, 1)
    theirs = twin_of(stage)
    add_fused_lm_head(theirs, outputs=FIELDS)
    inputs = padded([example.sequences[0] for example in examples])
    labels = inputs["input_ids"].masked_fill(inputs.pop("completion_mask") == 0, -100)
    args = SimpleNamespace(loss_type="nll", average_tokens_across_devices=False, max_length=None)
    trainer = _trainer(theirs, args=args, label_smoother=None, compute_loss_func=None)
    expected = SFTTrainer.compute_loss(trainer, theirs, {**inputs, "labels": labels})
    expected.backward()
    batch = _batch(examples)
    loss = completion_tokens(outputs_of(stage, batch), batch)
    _mean(loss).backward()
    torch.testing.assert_close(_mean(loss), expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(stage, theirs)
    _assert_same_metrics(loss, trainer._metrics["train"], ("mean_token_accuracy", "entropy"))


@pytest.mark.parametrize("center_coeff", [0.0, 0.1])
def test_reward(center_coeff: float) -> None:
    stage = make_stage("scalar")
    theirs = twin_of(stage)
    examples = random_examples(7, 2, {"margin": [0.0, 0.5, 1.0, -0.5, 2.0, 0.3, 0.1]})
    inputs = padded([e.sequences[0] for e in examples] + [e.sequences[1] for e in examples])
    del inputs["completion_mask"]
    inputs["margin"] = torch.tensor([example.values["margin"] for example in examples])
    trainer = _trainer(theirs, args=SimpleNamespace(center_rewards_coefficient=center_coeff or None))
    expected = RewardTrainer.compute_loss(trainer, theirs, inputs)
    expected.backward()
    batch = _batch([_scored(example) for example in examples])
    loss = score_objective(RewardConfig(center_coeff=center_coeff))(outputs_of(stage, batch), batch)
    _mean(loss).backward()
    torch.testing.assert_close(_mean(loss), expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(stage, theirs)
    _assert_same_metrics(loss, trainer._metrics["train"], ("accuracy", "margin", "mean_reward"))


# Ours, and what TRL calls it.
PAIRS = [
    (DpoConfig(), "sigmoid"),
    (DpoConfig(beta=0.5, length_average=True), "sigmoid_norm"),
    (DpoConfig(loss="robust", label_smoothing=0.1), "robust"),
    (DpoConfig(loss="ipo", length_average=True), "ipo"),
    (DpoConfig(loss="hinge"), "hinge"),
    (DpoConfig(loss="exo", label_smoothing=0.1), "exo_pair"),
    (DpoConfig(loss="nca"), "nca_pair"),
    (DpoConfig(loss="bco"), "bco_pair"),
    (DpoConfig(loss="sppo"), "sppo_hard"),
    (DpoConfig(loss="apo_zero"), "apo_zero"),
    (DpoConfig(loss="apo_down"), "apo_down"),
    (DpoConfig(loss="discopop"), "discopop"),
    (DpoConfig(sft_coeff=0.3, cross_entropy="token"), "sigmoid + sft"),
]


@pytest.mark.parametrize(("dpo", "name"), PAIRS, ids=[name for _, name in PAIRS])
def test_pairs(dpo: DpoConfig, name: str) -> None:
    stage, examples = make_stage(), random_examples(7, 2, {"margin": [0.0] * 7})
    theirs = twin_of(stage)
    add_fused_lm_head(theirs, outputs=FIELDS)
    reference = torch.linspace(-30, -10, 14, dtype=torch.float64)
    inputs = padded([e.sequences[0] for e in examples] + [e.sequences[1] for e in examples])
    inputs |= {"ref_chosen_logps": reference[0::2].float(), "ref_rejected_logps": reference[1::2].float()}
    trainer = _trainer(
        theirs,
        args=SimpleNamespace(discopop_tau=0.05),
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=name.split(" + "),
        loss_weights=[1.0, dpo.sft_coeff][: 1 + (dpo.sft_coeff > 0)],
        beta=dpo.beta,
        label_smoothing=dpo.label_smoothing,
        use_weighting=False,
    )
    expected = DPOTrainer._compute_loss(trainer, theirs, inputs, return_outputs=False)
    expected.backward()
    (batch,) = with_pairs_per_token([_with_reference(_batch(examples), reference)], Mesh.serial(), dpo)
    loss = pair_objective(dpo)(outputs_of(stage, batch), batch)
    _mean(loss).backward()
    torch.testing.assert_close(_mean(loss), expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(stage, theirs)
    names = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logits/chosen")
    names += ("logits/rejected", "logps/chosen", "logps/rejected", "mean_token_accuracy", "entropy")
    _assert_same_metrics(loss, trainer._metrics["train"], names)


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_labels(name: str) -> None:
    stage = make_stage()
    examples = random_examples(7, 1, {"desirable": [1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0]})
    others = mismatched(examples, 41)
    theirs = twin_of(stage)
    add_fused_lm_head(theirs, outputs=FIELDS)
    dpo = DpoConfig(loss=name, desirable_weight=1.5, undesirable_weight=0.7)  # type: ignore[arg-type]
    with torch.no_grad():  # a reference near the model, so that the drift is above 0 and below saturation
        sizes = [max(a.n_places, b.n_places) for a, b in zip(examples, others)]
        batch, twin = _batch(examples, sizes), _batch(others, sizes)
        near = answer_logprobs(outputs_of(stage, batch), batch).flatten().double()
        own = torch.zeros(7, dtype=torch.float64)
        own[batch.of_samples["answer"].flatten()[batch.of_samples["present"].flatten() > 0]] = near[
            batch.of_samples["present"].flatten() > 0
        ]
    reference = own - torch.linspace(-3, 4, 7, dtype=torch.float64)
    mismatch = torch.full((7,), -40.0, dtype=torch.float64)
    inputs = padded([example.sequences[0] for example in examples])
    inputs |= {f"KL_{key}": value for key, value in padded([example.sequences[0] for example in others]).items()}
    inputs |= {"label": torch.tensor([bool(example.values["desirable"]) for example in examples])}
    inputs |= {"ref_logps": reference.float(), "ref_KL_logps": mismatch.float()}
    trainer = _trainer(
        theirs,
        calculate_KL=name == "kto",
        precompute_ref_logps=True,
        loss_type=name,
        beta=dpo.beta,
        desirable_weight=dpo.desirable_weight,
        undesirable_weight=dpo.undesirable_weight,
    )
    trainer._compute_kl_logps = lambda model, batch: KTOTrainer._compute_kl_logps(trainer, model, batch)
    expected = KTOTrainer._compute_loss(trainer, theirs, inputs, return_outputs=False)
    expected.backward()
    batch = _with_reference(batch, reference)
    engine: Any = SimpleNamespace(compute=lambda batches, f: [f(outputs_of(stage, one), one) for one in batches])
    drift = _drift(engine, Mesh.serial(), [_with_reference(twin, mismatch)]) if name == "kto" else 0.0
    assert name != "kto" or drift > 0
    batch = _with_drift(batch, drift)
    loss = label_objective(dpo)(outputs_of(stage, batch), batch)
    _mean(loss).backward()
    torch.testing.assert_close(_mean(loss), expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(stage, theirs)
    names = ("kl", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected", "entropy")
    names += ("logits/chosen", "logits/rejected")
    _assert_same_metrics(loss, trainer._metrics["train"], names)


def _logprobs() -> tuple[Tensor, Tensor]:
    """Averages of log-probabilities, some close to 0, where log(1 − p) is delicate."""
    chosen = torch.tensor([-0.01, -0.5, -1.3, -4.0, -0.69], requires_grad=True)
    rejected = torch.tensor([-0.9, -0.002, -1.4, -2.0, -0.7], requires_grad=True)
    return chosen, rejected


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo(smoothing: float) -> None:
    dpo = DpoConfig(loss="simpo", beta=2.0, simpo_margin=0.7, label_smoothing=smoothing)
    ours, theirs = _logprobs(), _logprobs()
    trainer = _trainer(None, loss_type="simpo", beta=2.0, simpo_gamma=0.7, label_smoothing=smoothing, alpha=0.0)
    expected = CPOTrainer.cpo_loss(trainer, *theirs)[0].mean()
    _assert_same(PAIR_LOSSES["simpo"](Ratios(*ours), dpo).mean(), expected, ours, theirs)


def test_orpo() -> None:
    """Its cross-entropy over all tokens of the chosen texts, as TRL has it."""
    stage, examples = make_stage(), random_examples(7, 2, {"margin": [0.0] * 7})
    theirs, dpo = twin_of(stage), DpoConfig(loss="orpo", beta=0.3, cross_entropy="text")
    inputs = {}
    for i, part in enumerate(("chosen", "rejected")):
        own = padded([example.sequences[i] for example in examples])
        labels = own["input_ids"].masked_fill(own.pop("completion_mask") == 0, -100)
        inputs |= {f"{part}_{key}": value for key, value in {**own, "labels": labels}.items()}
    trainer = _trainer(theirs, beta=0.3, is_encoder_decoder=False, padding_value=0)
    for name in ("concatenated_inputs", "get_batch_logps"):
        setattr(trainer, name, getattr(ORPOTrainer, name))
    trainer.odds_ratio_loss = partial(ORPOTrainer.odds_ratio_loss, trainer)
    trainer.concatenated_forward = partial(ORPOTrainer.concatenated_forward, trainer)
    expected, metrics = ORPOTrainer.get_batch_loss_metrics(trainer, theirs, inputs)
    expected.backward()
    (batch,) = with_pairs_per_token([_batch(examples)], Mesh.serial(), dpo)
    loss = pair_objective(dpo)(outputs_of(stage, batch), batch)
    _mean(loss).backward()
    torch.testing.assert_close(_mean(loss), expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(stage, theirs)
    names = ("nll_loss", "log_odds_chosen", "log_odds_ratio", "rewards/chosen", "rewards/rejected", "rewards/margins")
    _assert_same_metrics(loss, {name: [value] for name, value in metrics.items()}, names)


@pytest.mark.parametrize("how", ["answer", "token", "text"])
def test_means_of_cross_entropy(how: Any) -> None:
    """By hand: of answers, of tokens, of prompts too."""
    stage, examples = make_stage(), random_examples(7, 2, {"margin": [0.0] * 7})
    dpo = DpoConfig(loss="orpo", cross_entropy=how)
    (batch,) = with_pairs_per_token([_batch(examples)], Mesh.serial(), dpo)
    with torch.no_grad():
        loss = pair_objective(dpo)(outputs_of(stage, batch), batch)
        plain = pair_objective(dpo.model_copy(update={"loss": "simpo", "sft_coeff": 1.0}))(
            outputs_of(stage, batch), batch
        )
        theirs = twin_of(stage)
        means, sums, n_tokens = [], 0.0, 0
        for example in examples:
            ids = torch.as_tensor(example.sequences[0].ids).long()
            losses = F.cross_entropy(theirs(ids[None]).logits[0, :-1], ids[1:], reduction="none")
            kept = losses if how == "text" else losses[torch.as_tensor(example.sequences[0].learned)[1:]]
            means, sums, n_tokens = [*means, kept.mean()], sums + kept.sum(), n_tokens + len(kept)
    expected = torch.stack(means).mean() if how == "answer" else sums / n_tokens
    for one in (loss, plain):
        assert _metric(one, "nll_loss") == pytest.approx(float(expected), rel=1e-5)


def test_openrlhfs_conventions() -> None:
    """DPO with label smoothing, and IPO on sums: by the formulas of OpenRLHF's `DPOLoss`, written out."""
    chosen, rejected = torch.tensor([2.0, -1.0, 7.0]), torch.tensor([-1.0, 0.5, 1.0])
    d, beta, wrong = chosen - rejected, 0.1, 0.2
    smoothed = -(1 - wrong) * (beta * d).sigmoid().log() - wrong * (-beta * d).sigmoid().log()
    cdpo = DpoConfig(loss="cdpo", label_smoothing=wrong)
    torch.testing.assert_close(PAIR_LOSSES["cdpo"](Ratios(chosen, rejected), cdpo), smoothed)
    squared = (d - 1 / (2 * beta)) ** 2
    torch.testing.assert_close(PAIR_LOSSES["ipo"](Ratios(chosen, rejected), DpoConfig(loss="ipo")), squared)


def _assert_same(actual: Tensor, expected: Tensor, ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for mine, other in zip(torch.autograd.grad(actual, ours), torch.autograd.grad(expected, theirs)):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
