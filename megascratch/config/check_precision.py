"""Rules of the optimizer's precision: what goes without master weights, with half of them, and with narrow state."""

from collections.abc import Iterator

from megascratch.config.schema import Config
from megascratch.errors import Problem

_BF16 = ("bf16", "fp8")  # values of train.dtype whose model is in bfloat16


def master_weights(config: Config, _: int | None) -> Iterator[Problem]:
    """Without them, only what AdamW computes in one pass, in float32, keeps small updates apart."""
    if config.optim.master_weights:
        return
    if config.train.dtype == "fp16":
        rule = "does not go with optim.master_weights = false: its range is too small for squares of gradients"
        yield Problem("train.dtype = fp16", rule, "use bf16, or keep master weights")
    if config.optim.name != "adamw":
        rule = "does not go with optim.master_weights = false"
        yield Problem(f"optim.name = {config.optim.name}", rule, "use adamw, or keep master weights")


def master_remainders(config: Config, _: int | None) -> Iterator[Problem]:
    """Halves of a weight are updated together, where the model's half is, by AdamW's kernel."""
    if not config.optim.master_remainders:
        return
    rule = "does not go with optim.master_remainders"
    if config.train.dtype not in _BF16:
        yield Problem(f"train.dtype = {config.train.dtype}", rule, "use bf16, or leave master_remainders out")
    if config.optim.name != "adamw":
        yield Problem(f"optim.name = {config.optim.name}", rule, "use adamw, or leave master_remainders out")
    if not config.optim.master_weights:
        yield Problem("optim.master_weights = false", rule, "leave one of them out")
    if config.parallel.offload_optimizer:
        yield Problem("parallel.offload_optimizer = true", rule, "leave one of them out")


def narrow_gradients(config: Config, _: int | None) -> Iterator[Problem]:
    """A gradient is computed in the model's dtype, so that is its narrowest sum."""
    if config.optim.main_grads_dtype == "bf16" and config.train.dtype not in _BF16:
        rule = f"does not go with train.dtype = {config.train.dtype}"
        yield Problem("optim.main_grads_dtype = bf16", rule, "use bf16, or leave it out")


def narrow_averages(config: Config, _: int | None) -> Iterator[Problem]:
    """β · v rounds to v where 1 − β is less than half of what the last bit of v stands for, 1/512 to 1/256 of it."""
    optim, dtype = config.optim, config.train.dtype
    otherwise = "bf16" if dtype in _BF16 and not optim.master_weights else "fp32"
    for key, beta in (("exp_avg_dtype", "beta1"), ("exp_avg_sq_dtype", "beta2")):
        if (getattr(optim, key) or otherwise) != "bf16":
            continue
        if dtype == "fp64":
            yield Problem(f"optim.{key} = bf16", "does not go with train.dtype = fp64", "leave it out")
        if (value := getattr(optim, beta)) > 1 - 2**-8:
            rule = "is too near 1 for an average in bf16, which would never shrink"
            yield Problem(f"optim.{beta} = {value:g}", rule, f"use at most 0.996, or optim.{key} = fp32")
