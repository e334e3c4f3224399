"""Rules of what turns a step into graphs: torch.compile of its layers, and a CUDA graph of all of it."""

from collections.abc import Iterator

from megascratch.config.schema import Config
from megascratch.errors import Problem


def compiled(config: Config, _: int | None) -> Iterator[Problem]:
    """What torch.compile does not see through, or would compile anew again and again."""
    if not config.train.compile:
        return
    parallel, model, rule = config.parallel, config.model, "does not go with train.compile"
    given = {
        f"parallel.tp = {parallel.tp}": parallel.tp > 1,
        f"parallel.cp = {parallel.cp}": parallel.cp > 1,
        f"parallel.pp = {parallel.pp}": parallel.pp > 1,
        f"parallel.zero = {parallel.zero}": parallel.zero == 3,
        f"parallel.recompute = {parallel.recompute}": parallel.recompute != "none",
        "train.cuda_graph = true": config.train.cuda_graph,
        "train.dtype = fp8": config.train.dtype == "fp8",
        f"model.dropout = {model.dropout}": model.dropout > 0,
        "model.moe": model.moe is not None,
        "model.mla": model.mla is not None,
        "lora": config.lora is not None,
        "rollout": config.rollout is not None,
    }
    yield from (Problem(key, rule, "leave one of them out") for key, is_given in given.items() if is_given)


def cuda_graph(config: Config, _: int | None) -> Iterator[Problem]:
    """What a recording would leave out: work that Python or the processor decides anew in each step."""
    if not config.train.cuda_graph:
        return
    parallel, model = config.parallel, config.model
    reasons = {
        f"parallel.pp = {parallel.pp}": (parallel.pp > 1, "stages tell each other in words what they measured"),
        "parallel.zero = 3": (parallel.zero == 3, "weights come and go in memory that Python gives out"),
        "parallel.offload_optimizer = true": (parallel.offload_optimizer, "the processor updates the weights"),
        "train.debug_collectives = true": (config.train.debug_collectives, "a replay has no collective to compare"),
        "model.moe": (model.moe is not None, "how many tokens each expert gets changes"),
    }
    for key, (is_given, why) in reasons.items():
        if is_given:
            yield Problem(key, f"does not go with train.cuda_graph: {why}", "leave one of them out")
