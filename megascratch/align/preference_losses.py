"""The losses of direct preference optimisation and its family: one table, each a formula over log-probabilities.

With c and r the log-probabilities of a chosen and a rejected answer, summed over its tokens, less the reference's, so
that d = c − r is how much more than the reference the model prefers the chosen one:

    sigmoid       −log σ(βd)                                               Rafailov et al. 2023, arXiv:2305.18290
    cdpo          −(1−ε) log σ(βd) − ε log σ(−βd)                          label smoothing, as OpenRLHF has it
    robust        [−(1−ε) log σ(βd) + ε log σ(−βd)] / (1−2ε)               Chowdhury et al. 2024, arXiv:2403.00409
    ipo           (d − 1/(2β))²                                            Azar et al. 2023, arXiv:2310.12036
    hinge         max(0, 1 − βd)                                           Zhao et al. 2023, arXiv:2305.10425
    exo           KL(σ(±βd) ‖ (1−ε, ε))                                    Ji et al. 2024, arXiv:2402.00856
    nca           −log σ(βc) − ½ log σ(−βc) − ½ log σ(−βr)                 Chen et al. 2024, arXiv:2402.05369
    bco           −log σ(βc) − log σ(−βr)                                  Jung et al. 2024, arXiv:2404.04656, no shift
    sppo          (c − 1/(2β))² + (r + 1/(2β))²                            Wu et al. 2024, arXiv:2405.00675
    apo_zero      1 − σ(βc) + σ(βr)                                        D'Oosterlinck et al. 2024, arXiv:2408.06266
    apo_down      σ(βc) + 1 − σ(βd)
    discopop      (1−m)(−log σ(βd)) + m e^{−βd}, m = σ(βd/0.05)            Lu et al. 2024, arXiv:2406.08414

Without a reference, on log-probabilities averaged over tokens:

    simpo         −log σ(β(d − γ/β)), smoothed as cdpo                     Meng et al. 2024, arXiv:2405.14734
    orpo          −β log σ(log-odds(c) − log-odds(r))                      Hong et al. 2024, arXiv:2403.07691

ORPO's loss has the chosen answer's cross-entropy besides, which any of them may have (`dpo.py`).

For answers one by one, c being an answer's, z how far the model has drifted (`kto.py`):

    kto                 w₊(1 − σ(β(c − z))) or w₋(1 − σ(β(z − c)))          Ethayarajh et al. 2024, arXiv:2402.01306
    apo_zero_unpaired   w₊(1 − σ(βc)) or w₋ σ(βc)

Worked example, β 0.1, c = 2, r = −1: d = 3, sigmoid −log σ(0.3) = 0.554; ipo (3 − 5)² = 4; hinge 0.7.

Legend: `p` pairs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from megascratch.config import DpoConfig

_DISCOPOP_TEMPERATURE = 0.05


@dataclass(frozen=True)
class Ratios:
    """Log-probabilities of chosen and rejected answers, [p] each, less the reference's where there is one."""

    chosen: Tensor
    rejected: Tensor

    @property
    def margin(self) -> Tensor:
        return self.chosen - self.rejected


PairLoss = Callable[[Ratios, DpoConfig], Tensor]


def _smoothed(logits: Tensor, smoothing: float) -> Tensor:
    return -(1 - smoothing) * F.logsigmoid(logits) - smoothing * F.logsigmoid(-logits)


def _robust(x: Ratios, dpo: DpoConfig) -> Tensor:
    wrong, logits = dpo.label_smoothing, dpo.beta * x.margin
    return (-(1 - wrong) * F.logsigmoid(logits) + wrong * F.logsigmoid(-logits)) / (1 - 2 * wrong)


def _exo(x: Ratios, dpo: DpoConfig) -> Tensor:
    logits = dpo.beta * x.margin
    right = torch.tensor([1 - dpo.label_smoothing, dpo.label_smoothing], dtype=logits.dtype, device=logits.device).log()
    own = torch.stack((F.logsigmoid(logits), F.logsigmoid(-logits)), dim=-1)
    return (own.exp() * (own - right)).sum(-1)


def _nca(x: Ratios, dpo: DpoConfig) -> Tensor:
    chosen, rejected = dpo.beta * x.chosen, dpo.beta * x.rejected
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def _discopop(x: Ratios, dpo: DpoConfig) -> Tensor:
    logits = dpo.beta * x.margin
    mix = torch.sigmoid(logits / _DISCOPOP_TEMPERATURE)
    return -F.logsigmoid(logits) * (1 - mix) + torch.exp(-logits) * mix


def _log_odds(logprob: Tensor) -> Tensor:
    """log p/(1 − p) of a log-probability below 0; log(1 − eˣ) has a stable form on either side of −log 2."""
    near = logprob > -0.6931471805599453
    # Each form is computed away from where it is unstable: a NaN that is not chosen would still reach the gradient.
    close = torch.log(-torch.expm1(torch.where(near, logprob, -0.5)))
    far = torch.log1p(-torch.exp(torch.where(near, -1.0, logprob)))
    return logprob - torch.where(near, close, far)


def log_odds_ratio(x: Ratios) -> Tensor:
    """Return the logarithm of how much better the odds of chosen answers are, from log-probabilities below 0."""
    return _log_odds(x.chosen) - _log_odds(x.rejected)


PAIR_LOSSES: Mapping[str, PairLoss] = MappingProxyType(
    {
        "sigmoid": lambda x, dpo: -F.logsigmoid(dpo.beta * x.margin),
        "cdpo": lambda x, dpo: _smoothed(dpo.beta * x.margin, dpo.label_smoothing),
        "robust": _robust,
        "ipo": lambda x, dpo: (x.margin - 1 / (2 * dpo.beta)) ** 2,
        "hinge": lambda x, dpo: torch.relu(1 - dpo.beta * x.margin),
        "exo": _exo,
        "nca": _nca,
        "bco": lambda x, dpo: -F.logsigmoid(dpo.beta * x.chosen) - F.logsigmoid(-dpo.beta * x.rejected),
        "sppo": lambda x, dpo: (x.chosen - 0.5 / dpo.beta) ** 2 + (x.rejected + 0.5 / dpo.beta) ** 2,
        "apo_zero": lambda x, dpo: torch.sigmoid(-dpo.beta * x.chosen) + torch.sigmoid(dpo.beta * x.rejected),
        "apo_down": lambda x, dpo: torch.sigmoid(dpo.beta * x.chosen) + torch.sigmoid(-dpo.beta * x.margin),
        "discopop": _discopop,
        "simpo": lambda x, dpo: _smoothed(dpo.beta * x.margin - dpo.simpo_margin, dpo.label_smoothing),
        "orpo": lambda x, dpo: -dpo.beta * F.logsigmoid(log_odds_ratio(x)),
    }
)
REFERENCE_FREE = ("simpo", "orpo")


def _kto(ratios: Tensor, drift: Tensor, desirable: Tensor, beta: float) -> Tensor:
    return torch.sigmoid(torch.where(desirable, drift - ratios, ratios - drift) * beta)


def _apo_zero_unpaired(ratios: Tensor, drift: Tensor, desirable: Tensor, beta: float) -> Tensor:
    return torch.sigmoid(torch.where(desirable, -ratios, ratios) * beta)


# Of answers one by one: ratios, drift and labels, [p] each, and β → losses [p], not yet weighted.
LABEL_LOSSES: Mapping[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = MappingProxyType(
    {"kto": _kto, "apo_zero_unpaired": _apo_zero_unpaired}
)
