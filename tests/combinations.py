"""What can be combined with what: asked of the configuration's own rules, two features at a time.

python tests/combinations.py        writes docs/layouts.md anew
"""

from pathlib import Path
from typing import Any, get_args

from bitwise import GROUPS
from layouts import MEANINGLESS, choices, make_config

from megascratch.config.check import CHUNKS
from megascratch.config.schema import ScheduleName
from megascratch.errors import ConfigError

PAGE = Path(__file__).parents[1] / "docs/layouts.md"

FEATURES: dict[str, dict[str, Any]] = {
    "tp": {"tp": 2, "sequence_parallel": True},
    "tp, no sp": {"tp": 2, "sequence_parallel": False},
    "cp ring": {"cp": 2, "cp_algorithm": "ring"},
    "cp ulysses": {"cp": 2, "cp_algorithm": "ulysses"},
    "cp all_gather": {"cp": 2, "cp_algorithm": "all_gather"},
    "dp": {"dp": 2},
    "deterministic dp": {"deterministic_dp": True},
    "ep": {"ep": 2},
    **{f"zero {stage}": {"zero": stage} for stage in choices("zero") if stage},
    "zero within 2 ranks": {"zero_ranks": 2},
    **{name: {"pp": 2, "schedule": name} for name in get_args(ScheduleName)},
    "balanced": {"layers_per_stage": "balanced"},
    **{f"recompute {what}": {"recompute": what} for what in choices("recompute") if what != "none"},
    "activations offloaded": {"offload_activations": True},
    "micro_batch 2": {"micro_batch": 2},
    "packed": {"packed": True},
    "tied": {"model": "tied"},
    "qk_norm": {"model": "qwen"},
    "post norm": {"model": "olmo"},
    "windows, capped scores": {"model": "gemma"},
    "learned positions": {"model": "gpt2"},
    "experts": {"model": "moe"},
    "experts of bounded capacity": {"model": "moe-capacity"},
    "dropout": {"model": "dropout"},
}


def completions(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the smallest layouts that give all of the values a meaning."""
    values = dict(values)
    schedule = values.get("schedule")
    if values.get("sequence_parallel") is not None:
        values.setdefault("tp", 2)
    if values.get("cp_algorithm") is not None:
        values.setdefault("cp", 2)
    if schedule is not None:
        values.setdefault("pp", 2)
        values.setdefault("vp", CHUNKS.get(schedule, 2))
    if values.get("vp", 1) > 1 or values.get("layers_per_stage") is not None:
        values.setdefault("pp", 2)
    if values.get("ep", 1) > 1:
        values.setdefault("dp", values["ep"])
        values.setdefault("model", "moe")
    if values.get("deterministic_dp"):
        values.setdefault("dp", 2)
    if values.get("zero_ranks") is not None:
        values.setdefault("zero", 1)
    if values.get("zero_ranks") == 2:
        return [{"dp": 4, **values}, {"dp": 2, "cp": 2, **values}]
    return [{"dp": 2, **values} if values.get("zero") else values]


def world_of(values: dict[str, Any]) -> int:
    """Return how many ranks a layout has."""
    world = 1
    for axis in ("tp", "pp", "cp", "dp"):
        world *= values.get(axis, 1)
    return world


def why_not(values: dict[str, Any]) -> str | None:
    """Return the rule that refuses a layout, or None where all rules allow it."""
    values = dict(values)
    model, micro_batch, packed = values.pop("model", "llama"), values.pop("micro_batch", 1), values.pop("packed", False)
    optim = values.pop("optim", "adamw")
    for key, (other, value) in MEANINGLESS.items():
        if key in values and values.get(other) == value:
            return f"{key} means nothing with {other} = {value}"
    values = {key: value for key, value in values.items() if value not in ("even", "all")}
    try:
        make_config(model, values, micro_batch, packed, 12, optim)
    except ConfigError as error:
        return f"`{error.problems[0].value}` {error.problems[0].rule}"
    return None


def page() -> str:
    """Return docs/layouts.md."""
    notes: list[str] = []
    names = list(FEATURES)
    rows = []
    for i, name in enumerate(names):
        cells = []
        for other in names[: i + 1]:
            cells.append(_cell(name, other, notes))
        rows.append(f"| **{name}** | " + " | ".join(cells + [""] * (len(names) - i - 1)) + " |")
    header = "| | " + " | ".join(names) + " |\n|---|" + ":-:|" * len(names)
    refused = "\n".join(f"{number}. {note}" for number, note in enumerate(notes, start=1))
    bits = "\n".join(f"| {', '.join(f'`{name}`' for name in group.layouts)} | {group.reason} |" for group in GROUPS)
    return _PAGE.format(table="\n".join([header, *rows]), refused=refused, bits=bits)


def _refusal(name: str, other: str) -> str | None:
    """Return why two features cannot be combined: "" where they are values of one choice; None where they can."""
    one, two = FEATURES[name], FEATURES[other]
    if any(one[key] != two[key] for key in one.keys() & two.keys()):
        return ""
    reasons = [why_not(values) for values in completions({**one, **two})]
    return None if None in reasons else reasons[0]


def goes_with(name: str, other: str) -> bool:
    """Return whether two features can be combined."""
    return _refusal(name, other) is None


def _cell(name: str, other: str, notes: list[str]) -> str:
    reason = "" if name == other else _refusal(name, other)
    if not reason:
        return "✓" if reason is None else "·" if name == other else ""
    if reason not in notes:
        notes.append(reason)
    return f"✗{notes.index(reason) + 1}"


_PAGE = """# What goes with what

Written by `python tests/combinations.py` from the rules of the configuration; a test holds it current. ✓: combines,
and stands in a layout of the matrix (`tests/matrix.py`), whose five float64 steps equal one rank's to 1e-9 in loss,
gradient norm and weights. ✗: refused before a run starts, with the message below. Empty: two values of one choice.

{table}

Refused:

{refused}

## Equal to the last bit

Floating-point sums depend on their order. Where a layout adds the same numbers in the same order as another, their
losses, gradient norms and weights agree bit for bit, and `tests/engine/test_schedules.py` compares them so:

| layouts | why |
|---|---|
{bits}

Every rank has as many threads: a product may be divided over them. Not bitwise, and why: tp and cp cut a product or a
softmax into parts and add them; dp and ZeRO add the ranks' sums of micro-batches, unless `deterministic_dp` gives them
an order; dualpipe adds the sums of two copies of the model; a tied embedding gets gradients from its two uses, and
under pp the schedule decides in which order; another micro-batch size lets one product add what were two. These agree
to 1e-9.
"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
