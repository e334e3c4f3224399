"""From a recipe file and `section.key=value` overrides to a checked `Config`, and back to TOML.

    file (TOML) ─┐
    overrides ───┼─ merge ─ preset defaults ─ types ─ resolve ─ check ─→ Config
    world size ──┘

Every step before the last collects its problems, so a user sees all mistakes at once.
"""

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from megascratch.config.check import check
from megascratch.config.presets import PRESETS
from megascratch.config.schema import Config, ModelConfig, ParallelConfig, ScheduleName
from megascratch.errors import ConfigError, Problem


def load_config(
    recipe: Path | None, overrides: Sequence[str] = (), *, world_size: int | None = None, where: str = ""
) -> Config:
    """Read, override, resolve and check a recipe.

    Args:
        recipe: a TOML file; None starts from the defaults.
        overrides: `section.key=value`; the value is TOML, or a bare string.
        world_size: number of ranks that will run; None takes what the layout asks for (dp = 1 where it is left out).
        where: name for messages; the recipe's path when left out.

    Raises: ConfigError: with every problem found.
    """
    where = where or (str(recipe) if recipe else "the command line")
    return config_from_dict(read_recipe(recipe, overrides), world_size=world_size, where=where)


def read_recipe(recipe: Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a recipe and what replaces its values, as nested dictionaries that nothing was checked of.

    Raises: ConfigError: if it is not TOML, or an override not of the form section.key=value.
    """
    raw = _read_toml(recipe) if recipe else {}
    for override in overrides:
        _apply_override(raw, override, str(recipe) if recipe else "the command line")
    return raw


def config_from_dict(
    raw: Mapping[str, Any], *, world_size: int | None = None, where: str = "the configuration"
) -> Config:
    """Build a checked `Config` from nested dictionaries, as read from TOML or from a checkpoint's `state.json`."""
    problems = list(_unknown_keys(raw, Config, prefix=""))
    merged = dict(raw)
    merged["model"], preset_problems = _with_preset(raw.get("model", {}))
    problems += preset_problems
    try:
        config = Config.model_validate(merged)
    except ValidationError as error:
        # Of a preset that is not known, every key that it would have given is missing too: only the cause is told.
        known = [e for e in error.errors() if not (preset_problems and e["type"] == "missing")]
        problems += [p for e in known if (p := _problem_of(e)) is not None]
        raise ConfigError(problems, where) from None
    if problems:
        raise ConfigError(problems, where)
    problems = list(check(config, world_size))
    if problems:
        raise ConfigError(problems, where)
    return resolve(config, world_size)


def resolve(config: Config, world_size: int | None = None) -> Config:
    """Put in every value that follows from the rest. Resolving twice changes nothing."""
    model, parallel = config.model, config.parallel
    others = parallel.tp * parallel.pp * parallel.cp
    dp = parallel.dp if parallel.dp is not None else max(1, (world_size or others) // others)
    return config.model_copy(
        update={
            "model": model.model_copy(
                update={
                    "n_kv_heads": model.n_kv_heads or model.n_heads,
                    "head_dim": model.head_dim or default_head_dim(model),
                }
            ),
            "parallel": parallel.model_copy(
                update={
                    "dp": dp,
                    "schedule": _default_schedule(parallel),
                    "sequence_parallel": parallel.tp > 1
                    if parallel.sequence_parallel is None
                    else parallel.sequence_parallel and parallel.tp > 1,
                }
            ),
            "optim": config.optim.model_copy(
                update={"decay_steps": config.optim.decay_steps or default_decay_steps(config)}
            ),
            "data": config.data.model_copy(update=_of_conversations(config)),
            "checkpoint": config.checkpoint.model_copy(
                update={"dir": config.checkpoint.dir or str(Path(config.log.dir) / "checkpoints")}
            ),
        }
    )


def _of_conversations(config: Config) -> dict[str, bool]:
    """Return the keys of [data] that follow from how conversations share samples."""
    if config.chat is None:
        return {}
    return {"reset_position_ids": config.chat.packing, "reset_attention_mask": config.chat.packing}


def default_head_dim(model: ModelConfig) -> int:
    """Return the size of a query and key head where it is not given."""
    if model.mla is not None:
        return model.mla.qk_head_dim + model.mla.qk_pos_emb_head_dim
    return model.hidden // model.n_heads


def _default_schedule(parallel: ParallelConfig) -> ScheduleName | None:
    """Return the schedule's name; none where a file stands for it."""
    if parallel.schedule is not None or parallel.schedule_file is not None:
        return parallel.schedule
    return "interleaved" if parallel.vp > 1 else "1f1b"


def default_decay_steps(config: Config) -> int:
    """Return where the learning rate ends: at the last step; for `wsd`, a final decay over a tenth of the run."""
    return max(1, config.train.steps // 10) if config.optim.schedule == "wsd" else config.train.steps


def to_toml(config: Config) -> str:
    """Write a configuration as TOML that `load_config` reads back to an equal value."""
    lines: list[str] = []
    _write_table(config.model_dump(exclude_none=True), "", lines)
    return "\n".join(lines).lstrip("\n") + "\n"


def _write_table(table: Mapping[str, Any], name: str, lines: list[str]) -> None:
    if name:
        lines += ["", f"[{name}]"]
    lines += [f"{key} = {_toml_value(value)}" for key, value in table.items() if not isinstance(value, Mapping)]
    for key, value in table.items():
        if isinstance(value, Mapping):
            _write_table(value, f"{name}.{key}" if name else key, lines)


def _toml_value(value: Any) -> str:
    """Write strings, numbers, booleans and lists as JSON does, but for the delete character: TOML escapes it."""
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key} = {_toml_value(item)}' for key, item in value.items())}}}"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(Problem(str(path), "no such recipe", "give the path of a TOML file")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(Problem(str(path), f"cannot be read: {error}", "give the path of a TOML file")) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(Problem("TOML syntax", str(error), "correct the file"), str(path)) from None


def _apply_override(raw: dict[str, Any], override: str, where: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        problem = Problem(override, "must have the form section.key=value", "for example train.steps=100")
        raise ConfigError(problem, where)
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word: parallel.schedule=1f1b needs no quotes in the shell
    table = raw
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(Problem(override, f"{part} is a value, not a section", "shorten the key"), where)
    table[parts[-1]] = value


def _with_preset(model: Any) -> tuple[Any, list[Problem]]:
    if not isinstance(model, Mapping) or model.get("preset") is None:
        return model, []
    name = model["preset"]
    if name not in PRESETS:
        close = difflib.get_close_matches(str(name), PRESETS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"one of {', '.join(PRESETS)}"
        return model, [Problem(f"model.preset = {name}", "is not a known preset", hint)]
    return _merged(PRESETS[name], model), []


def _merged(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Put given keys over defaults, within tables too."""
    both = {
        key: _merged(defaults[key], value)
        for key, value in given.items()
        if isinstance(value, Mapping) and isinstance(defaults.get(key), Mapping)
    }
    return {**defaults, **given, **both}


def _unknown_keys(raw: Any, schema: type[BaseModel], prefix: str) -> Iterator[Problem]:
    if not isinstance(raw, Mapping):
        return
    for key, value in raw.items():
        field = schema.model_fields.get(key)
        if field is None:
            close = difflib.get_close_matches(key, schema.model_fields, n=1)
            what = "key" if prefix else "section"
            names = ", ".join(schema.model_fields)
            yield Problem(
                f"{prefix}{key}", f"is not a known {what}", f"did you mean {close[0]}?" if close else f"known: {names}"
            )
            continue
        for candidate in (field.annotation, *get_args(field.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                for item in value if isinstance(value, list) else [value]:
                    yield from _unknown_keys(item, candidate, f"{prefix}{key}.")


def _problem_of(error: Any) -> Problem | None:
    """Turn one pydantic error into a problem; unknown keys were already reported, with a did-you-mean."""
    if error["type"] == "extra_forbidden":
        return None
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return Problem(key, "must be given", "set it, or name a model.preset that has it")
    return Problem(f"{key} = {error['input']!r}", error["msg"][:1].lower() + error["msg"][1:])
