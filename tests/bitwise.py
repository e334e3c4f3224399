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
    """

    reason: str
    layouts: dict[str, dict[str, Any]]
    model: str = "llama"


GROUPS = (
    Group(
        "a stage adds its gradients in the order of the micro-batches, whenever it computes them; that of a weight is"
        " the same product whether it is computed with the input's or put off; recomputing repeats the same operations",
        {
            **{name: {"pp": 2, "schedule": name} for name in ("1f1b", "gpipe", "zb-h1", "zb-h2")},
            **{
                f"{schedule} recompute {what}": {"pp": 2, "schedule": schedule, "recompute": what}
                for schedule in ("1f1b", "zb-h1")
                for what in choices("recompute")
                if what != "none"
            },
            "zb-h1 with offloaded activations": {"pp": 2, "schedule": "zb-h1", "offload_activations": True},
            "1f1b, every module computed again": {
                "pp": 2,
                "recompute": "selective",
                "recompute_modules": list(get_args(RecomputeModule)),
            },
        },
        "dropout",
    ),
    Group(
        "the same with the two stages of a V on each rank; dualpipe-v starts backwards earlier, in the same order",
        {
            **{name: {"pp": 2, "vp": 2, "schedule": name} for name in ("zb-v", "v-half", "v-min", "dualpipe-v")},
            "zb-v recompute full": {"pp": 2, "vp": 2, "schedule": "zb-v", "recompute": "full"},
        },
        "dropout",
    ),
)
