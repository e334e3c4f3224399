"""Rules of the sections of fine-tuning."""

from collections.abc import Iterator

from megascratch.config.schema import Config
from megascratch.errors import Problem

_SMOOTHED = ("cdpo", "robust", "exo", "simpo")  # losses that know of wrong labels


def scalar_head(config: Config, _: int | None) -> Iterator[Problem]:
    """Yield what a model that gives numbers cannot have."""
    if config.model.head == "scalar" and config.model.mtp_num_layers:
        value = f"model.mtp_num_layers = {config.model.mtp_num_layers}"
        yield Problem(value, "predicts tokens, which model.head = scalar does not", "leave it out")


def adapters(config: Config, _: int | None) -> Iterator[Problem]:
    """Yield what does not go with a base in 4 bits."""
    if config.lora is not None and config.lora.base == "nf4" and config.train.dtype == "fp8":
        rule = "multiplies in 8 bits by weights that lora.base = nf4 holds in 4"
        yield Problem("train.dtype = fp8", rule, "use bf16")


def preferences(config: Config, _: int | None) -> Iterator[Problem]:
    """Yield what a loss of preferences has no use for, or lacks."""
    dpo = config.dpo
    if dpo is None:
        return
    if dpo.label_smoothing and dpo.loss not in _SMOOTHED:
        rule = f"has no effect on dpo.loss = {dpo.loss}"
        yield Problem(f"dpo.label_smoothing = {dpo.label_smoothing}", rule, f"use {', '.join(_SMOOTHED)}")
    if dpo.cross_entropy != "answer" and not (dpo.sft_coeff or dpo.loss == "orpo"):
        rule = f"says how a cross-entropy is averaged, and dpo.loss = {dpo.loss} has none"
        yield Problem(f"dpo.cross_entropy = {dpo.cross_entropy}", rule, "set dpo.sft_coeff, or leave it out")
    if dpo.loss == "exo" and not dpo.label_smoothing:
        yield Problem("dpo.loss = exo", "needs dpo.label_smoothing above 0", "set it to 0.001")
    if dpo.reference == "base" and config.lora is None:
        rule = "is this model without its adapters, and there is no [lora]"
        yield Problem("dpo.reference = base", rule, "use precomputed or live")
