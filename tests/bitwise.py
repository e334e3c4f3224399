"""Layouts that sum in the same order, so that their bits agree."""

from dataclasses import dataclass
from typing import Any, get_args

from layouts import choices

from megascratch.config.schema import RecomputeModule


@dataclass(frozen=True)
class Group:
    """Layouts that agree bit for bit, and why.

    Attributes:
        reason: why the order of summation is the same.
        layouts: what is said of each in the documentation → its `[parallel]` keys.
        model: key of `layouts.MODELS`.
        global_batch: samples in a step.
    """

    reason: str
    layouts: dict[str, dict[str, Any]]
    model: str = "llama"
    global_batch: int = 8


def _in_tree(**parallel: Any) -> dict[str, Any]:
    return {"deterministic_dp": True, **parallel}


GROUPS = (
    Group(
        "a stage adds its gradients in the order of the micro-batches, whenever it computes them and on whichever rank;"
        " that of a weight is the same product whether it is computed with the input's or put off; recomputing repeats"
        " the same operations; losses, and squares of the parameters' gradients, are summed exactly",
        {
            "one rank": {},
            **{name: {"pp": 2, "schedule": name} for name in ("1f1b", "gpipe", "zb-h1", "zb-h2")},
            "1f1b on 4 ranks": {"pp": 4},
            **{
                name: {"pp": 2, "vp": 2, "schedule": name}
                for name in ("interleaved", "zb-v", "v-half", "v-min", "dualpipe-v")
            },
            **{
                f"{schedule} recompute {what}": {"pp": 2, "schedule": schedule, "recompute": what}
                for schedule in ("1f1b", "zb-h1")
                for what in choices("recompute")
                if what != "none"
            },
            "zb-v recompute full": {"pp": 2, "vp": 2, "schedule": "zb-v", "recompute": "full"},
            "zb-h1 with offloaded activations": {"pp": 2, "schedule": "zb-h1", "offload_activations": True},
            "1f1b with offloaded optimizer": {"pp": 2, "offload_optimizer": True},
            "1f1b, every module computed again": {
                "pp": 2,
                "recompute": "selective",
                "recompute_modules": list(get_args(RecomputeModule)),
            },
        },
        "dropout",
    ),
    Group(
        "with `deterministic_dp`, consecutive micro-batches are added in one tree, whose lower levels lie within ranks"
        " and whose upper ones between them",
        {
            **{f"deterministic dp = {dp}": _in_tree(dp=dp) for dp in (1, 2, 4, 8)},
            "dp = 2 under 1f1b": _in_tree(dp=2, pp=2),
            "dp = 2 under interleaved": _in_tree(dp=2, pp=2, vp=2),
            "dp = 4 under gpipe": _in_tree(dp=4, pp=2, schedule="gpipe"),
        },
        "moe",
        global_batch=24,
    ),
    Group(
        "the same under tp and cp, whose own sums dp does not change",
        {f"deterministic dp = {dp}, tp = 2, cp = 2": _in_tree(tp=2, cp=2, dp=dp) for dp in (1, 2)},
        "qwen",
    ),
    Group(
        "what is kept in host memory is updated by the same operations",
        {
            "zero 3": {"dp": 2, "zero": 3},
            "zero 3 with offloaded parameters": {"dp": 2, "zero": 3, "offload_parameters": True},
            "zero 3 with offloaded optimizer": {"dp": 2, "zero": 3, "offload_optimizer": True},
            "zero 3 with both": {"dp": 2, "zero": 3, "offload_parameters": True, "offload_optimizer": True},
        },
        "qwen",
    ),
)
