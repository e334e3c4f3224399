"""The matrix: layouts of up to 8 ranks, chosen so that whatever can be combined is combined somewhere.

A layout gives every factor a value. Each *pair* of values that the rules of the configuration allow together stands in
at least one layout (pairwise covering; Cohen et al. 1997, "The AETG system", section 3): most faults of a combination
need two of its parts. Every schedule and ZeRO stage, which share the gradients' buffers, meet under tp, cp and dp too:
these are triples. Nothing is listed by hand. The generator takes the first combination that is not covered yet, draws
layouts that have it, and keeps the one that covers the most new ones for its cost.

By hand, pairs of two schedules, two ZeRO stages and tied or untied embeddings, 4 layouts cover all 12 pairs:

    1f1b   zero 0   tied        gpipe  zero 0   untied
    1f1b   zero 1   untied      gpipe  zero 1   tied
"""

import functools
import itertools
import random
from collections.abc import Iterator
from typing import Any, get_args

from layouts import GLOBAL_BATCH, MEANINGLESS, MODELS, Layout, choices

from megascratch.config import OptimConfig
from megascratch.config.check import CHUNKS
from megascratch.config.schema import ScheduleName
from megascratch.errors import ConfigError

Values = dict[str, Any]  # factor → value; None where the factor has no meaning, as cp_algorithm for cp = 1
Combination = tuple[tuple[str, Any], ...]  # (factor, value) pairs that stand together

MOST_RANKS = 8
_DRAWS = 25  # layouts to choose from, for each one kept
_TRIALS = 1000  # draws after which a combination counts as impossible


FACTORS: dict[str, tuple[Any, ...]] = {
    "tp": (1, 2, 4),
    "pp": (1, 2, 3, 4),
    "cp": (1, 2, 4),
    "dp": (1, 2, 4, 8),
    "ep": (1, 2, 4),
    "vp": (1, 2, 3),
    "schedule": get_args(ScheduleName),
    "zero": choices("zero"),
    "zero_ranks": ("all", 2),
    "sequence_parallel": (True, False),
    "recompute": choices("recompute"),
    "offload_activations": (False, True),
    "cp_algorithm": choices("cp_algorithm"),
    "layers_per_stage": ("even", "balanced"),
    "micro_batch": (1, 2, 4),
    "packed": (False, True),
    "model": tuple(MODELS),
    "optim": choices("name", OptimConfig),
}


# Switches that are off but in the layouts drawn for them: with each value of each factor.
OPT_IN: dict[str, Any] = {"deterministic_dp": True}


def combinations_of(values: Values) -> set[Combination]:
    """Return the pairs and triples of values that a layout tries together."""
    given = [(name, values[name]) for name in (*OPT_IN, *FACTORS) if values.get(name) is not None]
    triples = {
        ((axis, values[axis]), ("schedule", values["schedule"]), ("zero", values["zero"]))
        for axis in ("tp", "cp", "dp")
    }
    return {*itertools.combinations(given, 2), *triples}


def _switched() -> list[Combination]:
    """Return the pairs of a switch that is on and a factor's value."""
    return [(item, (name, value)) for item in OPT_IN.items() for name in FACTORS for value in FACTORS[name]]


def _wanted() -> list[Combination]:
    """Return all pairs, and the triples that need two ranks along an axis; more ranks are not tried with each."""
    pairs = [((a, x), (b, y)) for a, b in itertools.combinations(FACTORS, 2) for x in FACTORS[a] for y in FACTORS[b]]
    triples = [
        ((axis, 2), ("schedule", schedule), ("zero", zero))
        for axis in ("tp", "cp", "dp")
        for schedule in FACTORS["schedule"]
        for zero in FACTORS["zero"]
    ]
    return [*pairs, *triples]


@functools.cache
def matrix() -> tuple[tuple[Layout, ...], frozenset[Combination]]:
    """Return the layouts, and the combinations that no layout of so few ranks and samples can have."""
    source = random.Random(20261120)
    wanted = _wanted()
    source.shuffle(wanted)
    covered: set[Combination] = set()
    impossible: set[Combination] = set()
    layouts: list[Layout] = []
    for combination in [*wanted, *_switched()]:
        if combination in covered:
            continue
        drawn = list(itertools.islice(_draw(dict(combination), source), _DRAWS))
        if not drawn:
            impossible.add(combination)
            continue
        best = max(drawn, key=lambda values: len(combinations_of(values) - covered) / _cost(values))
        covered |= combinations_of(best)
        layouts.append(_layout(best))
    return tuple(layouts), frozenset(impossible)


def _draw(fixed: Values, source: random.Random) -> Iterator[Values]:
    """Yield random layouts that have the fixed values, and that the rules allow."""
    for _ in range(_TRIALS):
        values = {name: source.choice(choices) for name, choices in FACTORS.items()} | fixed
        # Guesses that the rules will like; they decide.
        if values.get("deterministic_dp"):
            values |= {"zero": 0, "ep": 1, "dp": 2} | fixed
            values["schedule"] = fixed.get("schedule", "1f1b" if values["vp"] == 1 else "interleaved")
        if "ep" not in fixed and not values["model"].startswith("moe"):
            values["ep"] = 1
        if values["ep"] > 1 and "model" not in fixed:
            values["model"] = source.choice([model for model in MODELS if model.startswith("moe")])
        if fixed.get("vp", 1) > 1 and "schedule" not in fixed:
            values["schedule"] = "interleaved"
        if "dp" not in fixed and values["dp"] % values["ep"]:
            values["dp"] = values["ep"]
        if "vp" not in fixed:
            values["vp"] = CHUNKS.get(values["schedule"], source.choice((2, 3))) if values["pp"] > 1 else 1
        for name, (other, value) in MEANINGLESS.items():
            if values[other] == value:
                values[name] = None
        if any(values[name] != value for name, value in fixed.items()):
            continue
        if _world(values) <= MOST_RANKS and _allowed(values):
            yield values


def _world(values: Values) -> int:
    return int(values["tp"] * values["pp"] * values["cp"] * values["dp"])


def _allowed(values: Values) -> bool:
    try:
        _layout(values).config()
    except ConfigError:
        return False
    return True


def _layout(values: Values) -> Layout:
    values = dict(values)
    model, micro_batch, packed = values.pop("model"), values.pop("micro_batch"), values.pop("packed")
    optim = values.pop("optim")
    parallel = {key: value for key, value in values.items() if value not in (None, "even", "all")}
    said = [
        f"{key}{value}" for key, value in parallel.items() if key in ("tp", "pp", "cp", "dp", "ep", "vp") and value > 1
    ]
    said += [parallel["schedule"]] if "schedule" in parallel else []
    said += [f"zero{parallel['zero']}"] if parallel["zero"] else []
    said += [f"by{parallel['zero_ranks']}"] if "zero_ranks" in parallel else []
    said += [] if parallel.get("sequence_parallel", True) else ["no-sp"]
    said += [f"recompute-{parallel['recompute']}"] if parallel["recompute"] != "none" else []
    said += [name for name in OPT_IN if parallel.get(name)]
    said += ["offload"] if parallel["offload_activations"] else []
    said += [str(parallel[key]) for key in ("cp_algorithm", "layers_per_stage") if key in parallel]
    said += [f"mb{micro_batch}", *(["packed"] if packed else []), model, *([optim] if optim != "adamw" else [])]
    return Layout("-".join(said), parallel, model, micro_batch, packed, optim)


def _cost(values: Values) -> float:
    """Return roughly what a layout takes: starting the ranks, and every rank's collectives a micro-batch and layer."""
    layout = _layout(values)
    n_layers = layout.n_layers / values["pp"]
    microbatches = GLOBAL_BATCH / (values["micro_batch"] * values["dp"])
    per_layer = 0.3 + (values["tp"] > 1) + (values["cp"] > 1)
    return 1.0 + layout.world * microbatches * n_layers * per_layer / 32
