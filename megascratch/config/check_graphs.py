"""Rules of what turns a step into graphs: torch.compile of its layers, and a CUDA graph of all of it."""

from collections.abc import Iterator

from megascratch.config.check_batch import data_parallel
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


def cuda_graph(config: Config, world_size: int | None) -> Iterator[Problem]:
    """What a recording would leave out: steps whose work Python decides anew each time."""
    if not config.train.cuda_graph:
        return
    parallel, model = config.parallel, config.model
    dp = data_parallel(config, world_size)
    for name, value, only in (("pp", parallel.pp, 1), ("cp", parallel.cp, 1), ("dp", dp, 1)):
        if value != only:
            yield Problem(f"parallel.{name} = {value}", "does not go with train.cuda_graph", "leave cuda_graph out")
    if config.train.dtype == "fp16":
        rule = "does not go with train.cuda_graph: its loss scale changes"
        yield Problem("train.dtype = fp16", rule, "use bf16, or leave cuda_graph out")
    if model.moe is not None:
        rule = "do not go with train.cuda_graph: how many tokens each gets changes"
        yield Problem(f"model.moe: {model.moe.num_experts} experts", rule, "leave cuda_graph out")
