"""What a family of models is in Hugging Face's format: a table of reversible steps, and its words in `config.json`."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megascratch.checkpoint.families.rope import read_rope
from megascratch.checkpoint.steps import Step
from megascratch.config import ModelConfig
from megascratch.errors import CheckpointError, Problem

# What models of one family differ in. Whatever else a model has, its family must say: a new key of [model] is refused
# by every export until a family knows it.
SIZES = (
    *("preset", "n_layers", "hidden", "n_heads", "n_kv_heads", "head_dim", "ffn_hidden", "vocab_size", "norm_eps"),
    *("activation", "rope_theta", "rope_scaling", "max_seq_length", "tie_embeddings", "init_std", "dropout"),
    *("mtp_num_layers", "mtp_loss_scaling_factor"),
)
FEATURES = tuple(key for key in ModelConfig.model_fields if key not in SIZES)
_UNCHANGEABLE = "export cannot change it"


@dataclass(frozen=True)
class Family:
    """A family of models in Hugging Face's format.

    Attributes:
        model_type, architecture: as `config.json` says them.
        steps: the tensors; of two steps for one tensor of ours the later counts.
        features: keys of `[model]` that its models have otherwise than by default; `...` lets them have any value.
        activations: what a feed-forward layer may have, and its name in `config.json`.
        names: its own words for the common keys of `config.json`.
        defaults: what keys mean that a `config.json` leaves out.
        write: keys of `config.json` besides the common ones, from our shape.
        read: keys of `[model]` besides the common ones, from `config.json`.
        rope: reads what `config.json` says of rotary positions.
        refuses: yields what else a model has that the family has not.
        prefix: what tensors' names begin with, which some folders leave out.
        ignored: pattern of the names of tensors that say nothing: tables, masks.
    """

    model_type: str
    architecture: str
    steps: tuple[Step, ...]
    features: Mapping[str, Any] = field(default_factory=dict)
    activations: Mapping[str, str] = field(default_factory=lambda: {"swiglu": "silu"})
    names: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    write: Callable[[ModelConfig], dict[str, Any]] = lambda _: {}
    read: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda _: {}
    rope: Callable[[Mapping[str, Any]], dict[str, Any]] = read_rope
    refuses: Callable[[ModelConfig], Iterable[Problem]] = lambda _: ()
    prefix: str = "model."
    ignored: str = r".*rotary_emb\.inv_freq"

    def problems(self, model: ModelConfig) -> list[Problem]:
        """Return everything about a model that the family does not express."""
        defaults = {key: field.default for key, field in ModelConfig.model_fields.items()}
        needed = {key: self.features.get(key, defaults[key]) for key in FEATURES}
        problems = [
            Problem(
                f"model.{key} = {_short(value)}", f"must be {_short(needed[key])} in {self.model_type}", _UNCHANGEABLE
            )
            for key in FEATURES
            if needed[key] is not ... and (value := getattr(model, key)) != needed[key]
        ]
        if model.activation not in self.activations:
            rule = f"must be {' or '.join(self.activations)} in {self.model_type}"
            problems.append(Problem(f"model.activation = {model.activation}", rule, _UNCHANGEABLE))
        return problems or list(self.refuses(model))


def _short(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool | None) else str(value) if len(str(value)) < 40 else "given"


def must_be(model_type: str, section: str, values: Mapping[str, Any], needed: Mapping[str, Any]) -> list[Problem]:
    """Return a problem for each key of a section that is not what a family needs."""
    return [
        Problem(f"{section}.{key} = {values[key]}", f"must be {value} in {model_type}", _UNCHANGEABLE)
        for key, value in needed.items()
        if values[key] != value
    ]


def number(config: Mapping[str, Any], *names: str) -> Any:
    """Return the whole number by the first name that is there.

    Raises: CheckpointError: if there is none.
    """
    value = next((config[name] for name in names if config.get(name) is not None), None)
    if not isinstance(value, int) or isinstance(value, bool):
        raise CheckpointError(Problem(names[0], "must be given, as a number", "correct config.json"))
    return value


def refuse_other(config: Mapping[str, Any], rules: Mapping[str, tuple[Any, Any]]) -> None:
    """Check keys of `config.json` that our models have one value of.

    Args:
        config: `config.json`.
        rules: for each key what it is when left out, and what it must be.

    Raises: CheckpointError: with every key that is something else.
    """
    problems = [
        Problem(f"{key} = {config.get(key, default)}", f"must be {allowed}", "convert another model")
        for key, (default, allowed) in rules.items()
        if config.get(key, default) != allowed
    ]
    if problems:
        raise CheckpointError(problems)


def read_windows(config: Mapping[str, Any], kinds: list[str] | None = None) -> dict[str, Any]:
    """Return `sliding_window` and `window_attn_skip_freq` from `config.json`.

    Args:
        config: its `sliding_window` and `layer_types` are read.
        kinds: what `layer_types` is when left out; every layer has the window, if there is one, when that is left out.

    Raises: CheckpointError: if it is not every n-th layer that sees everything.
    """
    window, kinds = config.get("sliding_window"), config.get("layer_types") or kinds
    full = [i + 1 for i, kind in enumerate(kinds or []) if kind == "full_attention"]
    if set(map(str, kinds or [])) - {"full_attention", "sliding_attention"}:
        found = sorted(set(map(str, kinds or [])))
        raise CheckpointError(Problem(f"layer_types = {found}"[:200], "must be full_attention or sliding_attention"))
    if kinds and len(kinds) != config["num_hidden_layers"]:
        rule = f"must be one for each of {config['num_hidden_layers']} layers"
        raise CheckpointError(Problem(f"layer_types has {len(kinds)} entries", rule, "correct config.json"))
    if window is None or (kinds and len(full) == len(kinds)):
        return {}
    if not full:
        return {"sliding_window": window}
    every = full[0]
    if full != list(range(every, len(kinds or []) + 1, every)):
        rule = "every n-th layer sees everything here, the others have the window"
        raise CheckpointError(Problem("layer_types", rule, "convert another model"))
    return {"sliding_window": window, "window_attn_skip_freq": every}


def write_windows(model: ModelConfig) -> dict[str, Any]:
    """Return `sliding_window` and `layer_types` of `config.json`."""
    kinds = ["full" if model.window_of(i) is None else "sliding" for i in range(model.n_layers)]
    return {"sliding_window": model.sliding_window, "layer_types": [f"{kind}_attention" for kind in kinds]}
