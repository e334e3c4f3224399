"""Answers that are desirable or not, one by one: KTO, and APO without pairs.

KTO compares an answer with how far the model has drifted from its reference on answers that do not belong to the
prompt, z = max(0, mean of log π − log π_ref over mismatched answers), without gradient (Ethayarajh et al. 2024,
arXiv:2402.01306, section 4.1). Each prompt is given the next example's answer. The mean is over the whole global batch,
as TRL's is over all processes, so it is computed before the step begins:

    rows of the step ───────────────────────────── objective ─ backward ─ update
    the same rows, mismatched answers ─ z ────────────┘          (forward only)
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from megascratch.align.conversations import labelled
from megascratch.align.examples import Example, TokenSequence, read_examples
from megascratch.align.pairs import answer_logprobs, answers, document_values, over_tokens
from megascratch.align.preference_losses import LABEL_LOSSES
from megascratch.align.reference import reference_of
from megascratch.align.rows import Rows, collate_rows
from megascratch.align.sources import Complete, keep_template, open_sets
from megascratch.config import Config, DpoConfig
from megascratch.data.microbatch import Microbatch
from megascratch.dist import comm
from megascratch.dist.mesh import Mesh
from megascratch.engine import Begin, Engine, Loss, Objective, Outputs, Ratio, Task
from megascratch.log import make_console


def labelled_answers(config: Config, mesh: Mesh) -> Begin:
    """Read prompts with answers and labels.

    Raises: DataError, TokenizerError: if none can be used, or any cannot and the recipe is strict.
    """
    dpo = config.dpo or DpoConfig()
    examples = read_examples(config, labelled, make_console(mesh.rank))
    others = mismatched(examples, config.data.seq_length + 1)
    sizes = [max(one.n_places, other.n_places) for one, other in zip(examples, others)]
    sets = open_sets(config, examples, sizes)
    twins = open_sets(config, others, sizes, first_answer=len(examples))

    def begin(engine: Engine) -> Task:
        keep_template(config, mesh)
        everything = [*sets.rows, *twins.rows] if dpo.loss == "kto" else sets.rows
        reference = reference_of(config, mesh, engine, everything, dpo.reference)

        def complete(rows: Rows, twin: Rows) -> Complete:
            def add(microbatches: list[Microbatch]) -> list[Microbatch]:
                drift = 0.0
                if dpo.loss == "kto":
                    drift = _drift(engine, mesh, reference([_twin(m, twin) for m in microbatches]))
                return [_with_drift(m, drift) for m in reference(microbatches)]

            return add

        return sets.task(config, mesh, label_objective(dpo), [complete(*pair) for pair in zip(sets.rows, twins.rows)])

    return begin


def mismatched(examples: Sequence[Example], longest: int) -> list[Example]:
    """Give each prompt the next example's answer, cut to `longest` tokens. Values are kept."""
    found = []
    for one, other in zip(examples, [*examples[1:], examples[0]]):
        (asked,), (answered,) = one.sequences, other.sequences
        start, first = int(asked.learned.argmax()), int(answered.learned.argmax())
        # Of a prompt that fills the row, the end stays.
        before = asked.ids[:start][-(longest - 1) :]
        ids = np.concatenate([before, answered.ids[first:]])[:longest]
        learned = np.concatenate([np.zeros(len(before), np.bool_), answered.learned[first:]])[:longest]
        found.append(replace(one, sequences=(TokenSequence(ids, learned),)))
    return found


def _twin(microbatch: Microbatch, twin: Rows) -> Microbatch:
    return collate_rows(twin, range(int(microbatch.sample_ids[0]), int(microbatch.sample_ids[-1]) + 1))


def _drift(engine: Engine, mesh: Mesh, microbatches: list[Microbatch]) -> float:
    """Return max(0, mean of log π − log π_ref) over the answers of a global batch."""
    sums = torch.zeros(2, dtype=torch.float64, device=mesh.device)
    for microbatch, own in zip(microbatches, engine.compute(microbatches, answer_logprobs)):
        present = microbatch.of_samples["present"].to(mesh.device)
        ratios = own.double() - microbatch.of_samples["reference"].to(mesh.device)
        sums += torch.stack(((ratios * present).sum(), present.sum()))
    total, count = comm.sum_over(sums, mesh.dp).tolist()
    return max(0.0, total / count)


def _with_drift(microbatch: Microbatch, drift: float) -> Microbatch:
    of_samples = microbatch.of_samples
    return replace(microbatch, of_samples={**of_samples, "drift": torch.full_like(of_samples["present"], drift)})


def label_objective(dpo: DpoConfig) -> Objective:
    """Return the mean over answers of a loss of `LABEL_LOSSES`, with the metrics that TRL logs."""
    loss_of = LABEL_LOSSES[dpo.loss]

    def objective(outputs: Outputs, microbatch: Microbatch) -> Loss:
        of_tokens, notes = outputs.described_logprobs(microbatch.labels, microbatch.loss_mask)
        summed = answers(outputs, microbatch, of_tokens)
        of_samples = {name: summed.like(value).singles for name, value in microbatch.of_samples.items()}
        logprobs, desirable = summed.singles, of_samples["desirable"] > 0
        ratios = logprobs - of_samples["reference"]
        weights = torch.where(desirable, dpo.desirable_weight, dpo.undesirable_weight).to(ratios)
        losses = weights * loss_of(ratios, of_samples["drift"], desirable, dpo.beta)
        share = outputs.share
        mask = microbatch.loss_mask.to(of_tokens.dtype)
        of_each = document_values(microbatch, microbatch.of_samples["desirable"]) > 0
        metrics: dict[str, Tensor | Ratio] = {"kl": of_samples["drift"].sum() * share}
        metrics["entropy"] = over_tokens(notes.entropy, mask)
        for name, part in (("chosen", desirable), ("rejected", ~desirable)):
            kept = part.to(ratios)
            metrics[f"rewards/{name}"] = Ratio((dpo.beta * ratios * kept).sum() * share, kept.sum() * share)
            metrics[f"logps/{name}"] = Ratio((logprobs * kept).sum() * share, kept.sum() * share)
            metrics[f"logits/{name}"] = over_tokens(notes.mean_logit, mask * (of_each == (name == "chosen")))
        return Loss(losses.sum() * share, torch.ones_like(losses).sum() * share, metrics)

    return objective
