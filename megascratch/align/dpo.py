"""Direct preference optimisation and its family, as a way of training; the formulas are in `preference_losses`.

Besides it, times a coefficient, the cross-entropy of chosen answers may be learned: ORPO has it, and RPO's `sft_coeff`
(Pang et al. 2024, arXiv:2404.19733). Libraries take its mean differently, so each way has a name (`dpo.cross_entropy`).
By hand, chosen answers of 1 and 3 tokens with a loss of 4 and 2, 2, 2 nats, behind prompts of 2 tokens of 1 nat each:

    answer    of the answers' own means               (4 + 2) / 2 = 3
    token     over all tokens of the answers          (4 + 6) / 4 = 2.5          TRL's DPO with `sft`
    text      over all tokens, prompts included       (2 + 4 + 2 + 6) / 8 = 1.75     TRL's ORPO
"""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from megascratch.align.conversations import preference
from megascratch.align.examples import read_examples
from megascratch.align.kto import labelled_answers
from megascratch.align.pairs import answers, is_chosen, is_text, over_tokens
from megascratch.align.preference_losses import LABEL_LOSSES, PAIR_LOSSES, REFERENCE_FREE, Ratios, log_odds_ratio
from megascratch.align.reference import reference_of
from megascratch.align.sources import Complete, keep_template, open_sets, require_plain_layers, require_whole_pairs
from megascratch.config import Config, DpoConfig
from megascratch.data.microbatch import Microbatch
from megascratch.dist import comm
from megascratch.dist.mesh import Mesh
from megascratch.engine import Begin, Engine, Loss, Objective, Outputs, Ratio, Task
from megascratch.log import make_console


def preferences(config: Config, mesh: Mesh) -> Begin:
    """Read pairs, or labelled answers where the loss is of those.

    Raises: DataError, TokenizerError: if none can be used, or any cannot and the recipe is strict. ConfigError: if a
        micro-batch would cut pairs apart.
    """
    require_plain_layers(config)
    dpo = config.dpo or DpoConfig()
    if dpo.loss in LABEL_LOSSES:
        return labelled_answers(config, mesh)
    require_whole_pairs(config)
    sets = open_sets(config, read_examples(config, preference, make_console(mesh.rank)))

    def begin(engine: Engine) -> Task:
        keep_template(config, mesh)
        steps: list[Complete] = []
        if dpo.loss not in REFERENCE_FREE:
            steps.append(reference_of(config, mesh, engine, sets.rows, dpo.reference))
        if dpo.cross_entropy != "answer":
            steps.append(partial(with_pairs_per_token, mesh=mesh, dpo=dpo))

        def complete(microbatches: list[Microbatch]) -> list[Microbatch]:
            for step in steps:
                microbatches = step(microbatches)
            return microbatches

        return sets.task(config, mesh, pair_objective(dpo), [complete] * 2)

    return begin


def pair_objective(dpo: DpoConfig) -> Objective:
    """Return the mean over pairs of a loss of `PAIR_LOSSES`, with the metrics that TRL logs."""
    needs_reference = dpo.loss not in REFERENCE_FREE
    averages = dpo.length_average or not needs_reference
    coefficient = dpo.sft_coeff + (dpo.loss == "orpo")

    def objective(outputs: Outputs, microbatch: Microbatch) -> Loss:
        counts = is_text(microbatch) if dpo.cross_entropy == "text" else microbatch.loss_mask
        logprobs, notes = outputs.described_logprobs(microbatch.labels, counts)
        summed = answers(outputs, microbatch, logprobs)
        own = summed.pairs
        lengths = summed.like(microbatch.of_samples["n_learned"]).pairs
        ratios = own
        if needs_reference:
            reference = summed.like(microbatch.of_samples["reference"]).pairs
            ratios = Ratios(own.chosen - reference.chosen, own.rejected - reference.rejected)
        compared = _over(ratios, lengths) if averages else ratios
        share = outputs.share
        total = PAIR_LOSSES[dpo.loss](compared, dpo).sum() * share
        # TRL's rewards are of sums even where its loss is of averages, but where there is no reference.
        rewards = _scaled(ratios if needs_reference else compared, dpo.beta)
        sums = {**reward_metrics(rewards), "logps/chosen": own.chosen.sum(), "logps/rejected": own.rejected.sum()}
        if dpo.loss == "orpo":
            odds = log_odds_ratio(compared).detach()
            sums |= {"log_odds_chosen": odds.sum(), "log_odds_ratio": F.logsigmoid(odds).sum()}
        mask, chosen = microbatch.loss_mask.to(logprobs.dtype), is_chosen(microbatch)
        metrics: dict[str, Tensor | Ratio] = {
            **{name: value * share for name, value in sums.items()},
            "mean_token_accuracy": over_tokens(notes.hits, mask * chosen),
            "entropy": over_tokens(notes.entropy, mask),
            "logits/chosen": over_tokens(notes.mean_logit, mask * chosen),
            "logits/rejected": over_tokens(notes.mean_logit, mask * ~chosen),
        }
        if coefficient and dpo.cross_entropy == "answer":
            metrics["nll_loss"] = nll = -(own.chosen / lengths.chosen).sum() * share
            total = total + coefficient * nll
        elif coefficient:
            metrics["nll_loss"] = of_tokens = over_tokens(-logprobs, _counted(microbatch, dpo).to(logprobs.dtype))
            total = total + coefficient * of_tokens.total * microbatch.of_samples["pairs_per_token"][0, 0].to(total)
        return Loss(total, _count(own.chosen) * share, metrics)

    return objective


def _counted(microbatch: Microbatch, dpo: DpoConfig) -> Tensor:
    """Return the tokens of chosen answers, and of their prompts where those count too, [b, s] bool."""
    kept = is_text(microbatch) if dpo.cross_entropy == "text" else microbatch.loss_mask > 0
    return kept & is_chosen(microbatch)


def with_pairs_per_token(microbatches: list[Microbatch], mesh: Mesh, dpo: DpoConfig) -> list[Microbatch]:
    """Add `pairs_per_token` of the whole global batch: a mean over tokens, in a sum that is divided by pairs."""
    counts = [torch.stack((m.of_samples["present"].sum() / 2, _counted(m, dpo).sum())) for m in microbatches]
    pairs, tokens = comm.sum_over(torch.stack(counts).sum(0).to(mesh.device, torch.float64), mesh.dp).tolist()

    def added(m: Microbatch) -> Microbatch:
        share = torch.full_like(m.of_samples["present"], pairs / tokens)
        return replace(m, of_samples={**m.of_samples, "pairs_per_token": share})

    return [added(m) for m in microbatches]


def reward_metrics(rewards: Ratios) -> dict[str, Tensor]:
    """Return sums over pairs under TRL's names."""
    return {
        "rewards/chosen": rewards.chosen.sum(),
        "rewards/rejected": rewards.rejected.sum(),
        "rewards/margins": rewards.margin.sum(),
        "rewards/accuracies": (rewards.margin > 0).to(rewards.chosen.dtype).sum(),
    }


def _over(ratios: Ratios, lengths: Ratios) -> Ratios:
    return Ratios(ratios.chosen / lengths.chosen, ratios.rejected / lengths.rejected)


def _scaled(ratios: Ratios, factor: float) -> Ratios:
    return Ratios(ratios.chosen.detach() * factor, ratios.rejected.detach() * factor)


def _count(values: Tensor) -> Tensor:
    return torch.full((), float(len(values)), dtype=values.dtype, device=values.device)
