"""Rules of the master weights: what goes without them, and with half of them."""

from collections.abc import Iterator

from megascratch.config.schema import Config
from megascratch.errors import Problem


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
    if config.train.dtype not in ("bf16", "fp8"):
        yield Problem(f"train.dtype = {config.train.dtype}", rule, "use bf16, or leave master_remainders out")
    if config.optim.name != "adamw":
        yield Problem(f"optim.name = {config.optim.name}", rule, "use adamw, or leave master_remainders out")
    if not config.optim.master_weights:
        yield Problem("optim.master_weights = false", rule, "leave one of them out")
    if config.parallel.offload_optimizer:
        yield Problem("parallel.offload_optimizer = true", rule, "leave one of them out")
