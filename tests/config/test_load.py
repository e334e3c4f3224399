"""Reading recipes: overrides, presets, TOML both ways, and every mistake at once."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megascratch.config import PRESETS, Config, config_from_dict, load_config, resolve, to_toml
from megascratch.errors import ConfigError

MODEL = ["model.preset=tiny"]


def load(*overrides: str, world_size: int | None = None) -> Config:
    return load_config(None, [*MODEL, *overrides], world_size=world_size)


def problems_of(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides)
    return [problem.value for problem in caught.value.problems]


# Values


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.steps=100", "train", "steps", 100),
        ("optim.lr=3e-4", "optim", "lr", 3e-4),
        ("model.tie_embeddings=true", "model", "tie_embeddings", True),
        ("parallel.schedule=1f1b", "parallel", "schedule", "1f1b"),
        ('train.dtype="fp32"', "train", "dtype", "fp32"),
        ('data.paths=["a", "b"]', "data", "paths", ["a", "b"]),
        ("data.split=90,5,5", "data", "split", "90,5,5"),
        ("log.dir=runs/a=b", "log", "dir", "runs/a=b"),
        (" train.seed =7", "train", "seed", 7),
    ],
)
def test_override_is_toml_or_a_bare_word(override: str, section: str, key: str, value: object) -> None:
    assert getattr(getattr(load(override), section), key) == value


def test_override_reaches_a_nested_section() -> None:
    config = load("model.rope_scaling.type=linear", "model.rope_scaling.factor=2")
    assert config.model.rope_scaling is not None
    assert config.model.rope_scaling.factor == 2.0


def test_override_wins_over_the_recipe_and_the_recipe_over_the_preset(tmp_path: Path) -> None:
    recipe = tmp_path / "run.toml"
    recipe.write_text('[model]\npreset = "tiny"\nhidden = 512\nn_layers = 6\n')
    config = load_config(recipe, ["model.n_layers=2"])
    assert (config.model.hidden, config.model.n_layers) == (512, 2)
    assert config.model.ffn_hidden == PRESETS["tiny"]["ffn_hidden"]


def test_reading_does_not_change_the_input() -> None:
    raw = {"model": {"preset": "tiny"}}
    config_from_dict(raw)
    assert raw == {"model": {"preset": "tiny"}}


# What follows from the rest


def test_resolve_fills_in_what_follows() -> None:
    config = load("model.n_kv_heads=8", "parallel.tp=2", "optim.schedule=wsd", "train.steps=50", "log.dir=runs/x")
    assert config.model.head_dim == 32
    assert (config.parallel.dp, config.parallel.schedule, config.parallel.sequence_parallel) == (1, "1f1b", True)
    assert config.optim.decay_steps == 5
    assert config.checkpoint.dir == "runs/x/checkpoints"


def test_resolve_takes_dp_from_the_world_size() -> None:
    assert load("parallel.tp=2", "train.global_batch=8", world_size=8).parallel.dp == 4


def test_chunks_make_the_schedule_interleaved() -> None:
    assert load("parallel.pp=2", "parallel.vp=2").parallel.schedule == "interleaved"


def test_sequence_parallel_can_be_switched_off_and_needs_no_switch_on_one_rank() -> None:
    assert load("parallel.tp=2", "parallel.sequence_parallel=false").parallel.sequence_parallel is False
    assert load().parallel.sequence_parallel is False
    assert load("parallel.sequence_parallel=true").parallel.sequence_parallel is False, "as resolved on another layout"


@pytest.mark.parametrize("name", PRESETS)
def test_resolving_twice_changes_nothing(name: str) -> None:
    config = load_config(None, [f"model.preset={name}"])
    assert resolve(config) == config


# TOML


@pytest.mark.parametrize("name", PRESETS)
def test_toml_round_trip_of_presets(name: str, tmp_path: Path) -> None:
    config = load_config(None, [f"model.preset={name}", "parallel.pp=2", "train.global_batch=16", "data.weights=[]"])
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    assert load_config(file) == config


@given(
    directory=st.text(st.characters(codec="utf-8")),
    paths=st.lists(st.text(st.characters(codec="utf-8")), max_size=3),
    lr=st.floats(min_value=1e-300, max_value=1e300),
    tie=st.booleans(),
)
def test_toml_round_trip_of_any_value(directory: str, paths: list[str], lr: float, tie: bool) -> None:
    config = config_from_dict(
        {
            "model": {"preset": "tiny", "tie_embeddings": tie},
            "data": {"paths": paths},
            "optim": {"lr": lr},
            "log": {"dir": directory},
        }
    )
    assert config_from_dict(tomllib.loads(to_toml(config))) == config


# Mistakes


def test_all_mistakes_are_told_at_once() -> None:
    values = problems_of("model.preset=tiny", "train.stesp=5", "trian.steps=5", "optim.lr=-1", "train.dtype=fp7")
    assert values == ["train.stesp", "trian", "train.dtype = 'fp7'", "optim.lr = -1"]


def test_rules_between_sections_are_told_at_once() -> None:
    values = problems_of("model.preset=tiny", "parallel.tp=3", "train.global_batch=7", "train.micro_batch=2")
    assert values == ["parallel.tp = 3", "train.global_batch = 7"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stesp=5", r"train\.stesp +is not a known key +did you mean steps\?"),
        ("trian.steps=5", r"trian +is not a known section +did you mean train\?"),
        ("train.xyzzy=5", r"train\.xyzzy +is not a known key +known: steps, stop_step, global_batch"),
        ("model.rope_scaling.fctor=2", r"model\.rope_scaling\.fctor +is not a known key +did you mean factor\?"),
        ("model.preset=tinny", r"model\.preset = tinny +is not a known preset +did you mean tiny\?"),
        ("model.preset=xyzzy", r"is not a known preset +one of tiny, gpt2-124m"),
        ("train.steps=0", r"train\.steps = 0 +input should be greater than or equal to 1"),
        ("train.steps=many", r"train\.steps = 'many' +input should be a valid integer"),
        ("optim.lr=inf", r"optim\.lr = inf +input should be a finite number"),
        ("model.norm=batchnorm", r"model\.norm = 'batchnorm' +input should be 'rmsnorm' or 'layernorm'"),
        ("model.n_layers", r"model\.n_layers +must have the form section\.key=value +for example"),
        ("steps=5", r"steps=5 +must have the form section\.key=value"),
        (".steps=5", r"\.steps=5 +must have the form section\.key=value"),
        ("model.preset.name=5", r"model\.preset\.name=5 +preset is a value, not a section +shorten the key"),
    ],
)
def test_mistake_has_value_rule_and_remedy(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(override)


def test_missing_model_says_what_to_set() -> None:
    with pytest.raises(ConfigError, match=r"model\.n_layers +must be given +set it, or name a model\.preset"):
        load_config(None)


def test_unknown_preset_is_one_problem() -> None:
    assert problems_of("model.preset=tinny") == ["model.preset = tinny"]


def test_headline_names_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "run.toml"
    recipe.write_text('[model]\npreset = "tiny"\n[train]\nstesp = 1\n')
    with pytest.raises(ConfigError, match=rf"^1 problem in {recipe}"):
        load_config(recipe)


def test_missing_recipe() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml +no such recipe +give the path of a TOML file"):
        load_config(Path("nowhere.toml"))


def test_recipe_that_is_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


@pytest.mark.parametrize("content", [b"[model\n", b"\xff\xfe", b"model = {"])
def test_recipe_that_is_not_toml(tmp_path: Path, content: bytes) -> None:
    recipe = tmp_path / "run.toml"
    recipe.write_bytes(content)
    with pytest.raises(ConfigError, match=r"TOML syntax|cannot be read"):
        load_config(recipe)


def test_a_section_must_be_a_table(tmp_path: Path) -> None:
    recipe = tmp_path / "run.toml"
    recipe.write_text("model = 3\ntrain = 4\n")
    with pytest.raises(ConfigError, match=r"2 problems.*\n +model = 3 +input should be .*\n +train = 4 +input should"):
        load_config(recipe)


def test_configuration_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load().train.steps = 3  # type: ignore[misc]


def test_a_resolved_recipe_runs_on_another_layout(tmp_path: Path) -> None:
    """`config.toml` of a run is a recipe: resuming on another layout must not mean editing it."""
    saved = tmp_path / "config.toml"
    saved.write_text(to_toml(load("parallel.tp=2")))
    assert load_config(saved, ["parallel.tp=1", "parallel.pp=2"]).parallel.sequence_parallel is False


def test_a_number_may_stand_for_a_word() -> None:
    assert load("data.split=100").data.split == "100"
