"""Reward model: a score for each answer, so that the chosen one of a pair scores higher (Bradley–Terry).

    −log σ(c − r − m) + λ (c + r)²      c, r: the scores of chosen and rejected, m: the pair's margin

The score is the scalar head's number at the last token of an answer. Only differences are learned, so scores may drift
together; λ keeps them around 0 (Eisenstein et al. 2023, arXiv:2312.09244, section 2).

A model whose σ(c − r) is right as often as it says is calibrated. Validation compares both in ten bins of what it says,
½ to 1, and tells by how much they differ on average (Guo et al. 2017, arXiv:1706.04599, equation 3).
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megascratch.align.conversations import preference
from megascratch.align.examples import read_examples
from megascratch.align.pairs import answers
from megascratch.align.sources import keep_template, open_sets, require_plain_layers, require_whole_pairs
from megascratch.config import Config, RewardConfig
from megascratch.data.microbatch import Microbatch
from megascratch.dist.mesh import Mesh
from megascratch.engine import Begin, Engine, Loss, Objective, Outputs, Task, Totals, valid_loss
from megascratch.log import make_console

_BINS = 10
_BIN = "calibration/bin_"


def reward_model(config: Config, mesh: Mesh) -> Begin:
    """Read pairs.

    Raises: DataError, TokenizerError: if none can be used, or any cannot and the recipe is strict. ConfigError: if a
        micro-batch would cut pairs apart.
    """
    require_plain_layers(config)
    require_whole_pairs(config)
    sets = open_sets(config, read_examples(config, preference, make_console(mesh.rank), scored=True))

    def begin(engine: Engine) -> Task:
        keep_template(config, mesh)
        return sets.task(config, mesh, score_objective(config.reward or RewardConfig()), describe=described)

    return begin


def score_objective(reward: RewardConfig) -> Objective:
    """Return the mean over pairs of the loss, with the metrics that TRL logs, and what calibration is made of."""

    def objective(outputs: Outputs, microbatch: Microbatch) -> Loss:
        found = answers(outputs, microbatch, outputs.scores)
        scores, margins = found.pairs, found.like(microbatch.of_samples["margin"]).pairs.chosen
        losses = -F.logsigmoid(scores.margin - margins)
        if reward.center_coeff:
            losses = losses + reward.center_coeff * (scores.chosen + scores.rejected) ** 2
        right = (scores.margin > 0).to(losses.dtype)
        metrics = {
            "accuracy": right.sum(),
            "margin": scores.margin.sum(),
            "mean_reward": (scores.chosen + scores.rejected).sum() / 2,
            **_calibration(scores.margin.detach(), right),
        }
        share = outputs.share
        metrics = {name: value * share for name, value in metrics.items()}
        return Loss(losses.sum() * share, torch.ones_like(losses).sum() * share, metrics)

    return objective


def _calibration(margin: Tensor, right: Tensor) -> dict[str, Tensor]:
    """Return, for each bin of how sure the model is, Σ (right − sure)."""
    sure = torch.sigmoid(margin.abs())
    bins = ((sure - 0.5) * 2 * _BINS).long().clamp(max=_BINS - 1)
    sums = torch.zeros(_BINS, dtype=sure.dtype, device=sure.device).index_add(0, bins, right - sure)
    return {f"{_BIN}{i}": value for i, value in enumerate(sums)}


def described(totals: Totals) -> dict[str, float]:
    """Name what validation found; the bins become one calibration error."""
    bins = {name: value for name, value in totals.metrics.items() if name.startswith(_BIN)}
    rest = {name: value for name, value in totals.metrics.items() if name not in bins}
    values = valid_loss(replace(totals, metrics=rest))
    return {**values, "valid_calibration_error": sum(map(abs, bins.values()))}
