"""Direct preference optimisation and its family, as a way of training; the formulas are in `preference_losses`."""

import torch
from torch import Tensor

from megascratch.align.conversations import preference
from megascratch.align.examples import read_examples
from megascratch.align.kto import labelled_answers
from megascratch.align.pairs import answers, is_chosen
from megascratch.align.preference_losses import LABEL_LOSSES, PAIR_LOSSES, REFERENCE_FREE, Ratios
from megascratch.align.reference import reference_of
from megascratch.align.sources import Complete, keep_template, open_sets, require_plain_layers, require_whole_pairs
from megascratch.config import Config, DpoConfig
from megascratch.data.microbatch import Microbatch
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
        complete: list[Complete] = []
        if dpo.loss not in REFERENCE_FREE:
            complete = [reference_of(config, mesh, engine, sets.rows, dpo.reference)] * 2
        return sets.task(config, mesh, pair_objective(dpo), complete)

    return begin


def pair_objective(dpo: DpoConfig) -> Objective:
    """Return the mean over pairs of a loss of `PAIR_LOSSES`, with the metrics that TRL logs."""
    needs_reference = dpo.loss not in REFERENCE_FREE
    averages = dpo.length_average or not needs_reference

    def objective(outputs: Outputs, microbatch: Microbatch) -> Loss:
        logprobs, hits = outputs.logprobs_and_hits(microbatch.labels)
        summed = answers(outputs, microbatch, logprobs)
        own = summed.pairs
        lengths = summed.like(microbatch.of_samples["n_learned"]).pairs
        ratios = own
        if needs_reference:
            reference = summed.like(microbatch.of_samples["reference"]).pairs
            ratios = Ratios(own.chosen - reference.chosen, own.rejected - reference.rejected)
        compared = _over(ratios, lengths) if averages else ratios
        losses = PAIR_LOSSES[dpo.loss](compared, dpo)
        if dpo.sft_coeff:
            losses = losses - dpo.sft_coeff * own.chosen / lengths.chosen
        # TRL's rewards are of sums even where its loss is of averages, but where there is no reference.
        rewards = _scaled(ratios if needs_reference else compared, dpo.beta)
        metrics = {**reward_metrics(rewards), "logps/chosen": own.chosen.sum(), "logps/rejected": own.rejected.sum()}
        share = outputs.share
        chosen_tokens = microbatch.loss_mask.to(logprobs.dtype) * is_chosen(microbatch)
        accuracy = Ratio((hits * chosen_tokens).sum(), chosen_tokens.sum())
        return Loss(
            losses.sum() * share,
            _count(losses) * share,
            {**{name: value * share for name, value in metrics.items()}, "mean_token_accuracy": accuracy},
        )

    return objective


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
