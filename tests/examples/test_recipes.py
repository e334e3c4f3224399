"""Every recipe under examples/ is right for the machines that its comment names."""

from pathlib import Path

import pytest

from megascratch.config import load_config

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("recipe", "world_size"),
    [
        ("assistant/arithmetic/sft.toml", 1),
        ("assistant/arithmetic/grpo.toml", 1),
        ("assistant/arithmetic/ppo.toml", 1),
        ("assistant/docstrings/sft.toml", 1),
        ("assistant/docstrings/reward.toml", 1),
        ("assistant/docstrings/dpo.toml", 1),
        ("assistant/docstrings/ppo.toml", 1),
        ("assistant/docstrings/grpo.toml", 1),
        ("assistant/preferences/sft.toml", 1),
        ("assistant/preferences/reward.toml", 1),
        ("assistant/preferences/dpo.toml", 1),
        ("demo/pretrain.toml", 4),
        ("single_node/pretrain.toml", 8),
        ("slurm/pretrain.toml", 64),
        ("tinyshakespeare/pretrain.toml", 1),
    ],
)
def test_recipe_fits_its_machines(recipe: str, world_size: int) -> None:
    parallel = load_config(EXAMPLES / recipe, world_size=world_size).parallel
    assert parallel.tp * parallel.pp * parallel.cp * (parallel.dp or 0) == world_size


def test_every_recipe_is_tested() -> None:
    tested = {case[0] for case in test_recipe_fits_its_machines.pytestmark[0].args[1]}  # type: ignore[attr-defined]
    assert {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.toml")} == tested


def test_demo_resumes_on_another_layout_of_as_many_ranks() -> None:
    other = ["parallel.tp=1", "parallel.pp=2", "parallel.dp=2"]
    assert load_config(EXAMPLES / "demo/pretrain.toml", other).parallel.dp == 2
