"""Whole runs of `grpo` and `ppo`: what they write, how they resume on another layout, and what stops them at once."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_models import SHAPE, save_model, tokenizer

from megascratch.align import ppo
from megascratch.align.methods import METHODS
from megascratch.checkpoint import find
from megascratch.checkpoint.source import own
from megascratch.config import Config, config_from_dict
from megascratch.dist.mesh import Mesh
from megascratch.dist.testing import RankPool
from megascratch.engine import Engine, train_on
from megascratch.errors import CheckpointError, ConfigError, DataError

REWARD = """
def vowels(prompt, completion, record):
    if record["answer"] == "2":
        raise ValueError("two is not scored")
    return sum(letter in "aeiou" for letter in completion) / (1 + len(completion))
"""
OF_THE_MACHINE = re.compile("_s$|/s$|mfu|flops|bytes")  # names of what no layout shares with another
ROLLOUT = {"prompts": 4, "samples": 2, "max_tokens": 6, "temperature": 1.2, "scores": [{"kind": "number"}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold a tokenizer, prompts, a reward, and a reward model."""
    folder = tmp_path_factory.mktemp("reinforcement")
    tokenizer().save(folder / "tokenizer.json")
    prompts = [{"prompt": f"def f{i}(", "answer": i} for i in range(5)]
    prompts.append({"prompt": [{"role": "user", "content": "Zwölf?"}], "answer": 12})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    (folder / "scored_by.py").write_text(REWARD)
    save_model(folder / "judge", head="scalar", dtype="fp64")
    return folder


def make(folder: Path, run: Path, **sections: Any) -> Config:
    """Return the configuration of 8 steps on 4 completions each."""
    raw: dict[str, Any] = {
        "model": {**SHAPE, "vocab_size": tokenizer().vocab_size, "init_std": 0.1},
        "data": {
            "paths": [str(folder / "prompts.jsonl")],
            "tokenizer": str(folder / "tokenizer.json"),
            "seq_length": 32,
        },
        "chat": {"template": "plain", "packing": False},
        "train": {"dtype": "fp64", "steps": 8, "global_batch": 4},
        "optim": {"lr": 0.01, "eps": 1e-4, "schedule": "constant"},
        "log": {"dir": str(run), "tensorboard": False},
        "rollout": ROLLOUT,
        "ppo": {"kl_target": 0.5, "kl_horizon": 50},
    }
    for name, values in sections.items():
        raw[name] = {**raw.get(name, {}), **values}
    return config_from_dict(raw)


def run(config: Config, verb: str) -> int:
    """Run one rank of a run."""
    torch.set_num_threads(1)
    return train_on(config, Mesh.of(config, torch.device("cpu")), METHODS[verb].open)


def logged(config: Config, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.log.dir) / file).read_text().splitlines()]


def test_a_run_of_grpo_says_what_it_did(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that fails costs its own completions alone, and is told of by sample and line."""
    monkeypatch.chdir(folder)
    scores = [{"kind": "function", "function": "scored_by:vowels"}, {"kind": "regex", "pattern": "e", "weight": 0.5}]
    config = make(folder, tmp_path, rollout={"scores": scores, "log_completions": 3}, grpo={"kl_coeff": 0.05})
    assert run(config, "grpo") == 0
    metrics = logged(config)
    assert [line["step"] for line in metrics] == list(range(1, 9))
    first = metrics[0]
    assert {"reward", "reward_std", "frac_reward_zero_std", "rewards/vowels/mean", "rewards/regex/std"} <= first.keys()
    assert {"kl", "entropy", "clip_ratio/region_mean", "completions/clipped_ratio"} <= first.keys()
    assert first["kl"] == 0.0, "the reference is what the run began with"
    assert any(line["kl"] > 0 for line in metrics[2:])
    assert any(line.get("rewards/missing", 0) > 0 for line in metrics)
    assert first["val/ratio"] == 1.0
    said = logged(config, "completions.jsonl")
    assert len(said) == 3 * 4  # of each of four rollouts
    assert {"prompt", "completion", "reward", "advantage", "where", "stopped", "step"} <= said[0].keys()
    assert any(line["rewards/vowels"] is None and line["advantage"] == 0 for line in said)
    assert (tmp_path / "chat_template.jinja").is_file()


PPO = {"rollout": {"samples": 1, "prompts": 8, "epochs": 2}}
GRPO = {
    "rollout": {"prompts": 2, "samples": 4, "epochs": 2, "scores": [{"kind": "regex", "pattern": "[aeiou]"}]},
    "grpo": {"kl_coeff": 0.1},
    "chat": {"packing": True},
}


@pytest.mark.parametrize(
    ("verb", "sections", "first", "second"),
    [
        ("ppo", PPO, {"tp": 2, "dp": 2, "zero": 3}, {"pp": 2, "cp": 2}),
        ("ppo", PPO, {"pp": 2}, {}),
        ("grpo", GRPO, {"pp": 2, "dp": 2, "zero": 1}, {"tp": 2, "cp": 2}),
        ("grpo", GRPO, {}, {"dp": 2, "zero": 3}),
    ],
)
def test_a_run_goes_on_on_another_layout(
    verb: str,
    sections: dict[str, Any],
    first: dict[str, Any],
    second: dict[str, Any],
    folder: Path,
    tmp_path: Path,
    pool: RankPool,
) -> None:
    """4 steps and 4 more are 8 steps: engines, optimizers, the adaptive coefficient, what is logged."""
    straight = make(folder, tmp_path / "straight", **sections)
    assert run(straight, verb) == 0
    for parallel, stop in ((first, 4), (second, None)):
        resumed = make(folder, tmp_path / "run", **sections, train={"stop_step": stop}, parallel=parallel)
        assert set(pool.run(math.prod(n for axis, n in parallel.items() if axis != "zero"), run, resumed, verb)) == {0}
    metrics, expected = logged(resumed), logged(straight)
    for got, want in zip(metrics, expected, strict=True):
        assert got.keys() == want.keys()
        for name in (name for name in want if not OF_THE_MACHINE.search(name)):
            assert got[name] == pytest.approx(want[name], rel=1e-9, abs=1e-12), (want["step"], name)
    source, reference = (own(find(tmp_path / name / "checkpoints")) for name in ("run", "straight"))
    assert source.kinds == reference.kinds
    for name in reference.kinds:
        got, want = source.read(name), reference.read(name)
        assert (got - want).norm() <= 1e-9 * want.norm(), name
    if verb == "ppo":
        assert expected[0]["objective/kl_coef"] != expected[4]["objective/kl_coef"]
        assert "companions/critic/score.weight" in source.kinds
    else:
        assert any(line["kl"] > 1e-6 for line in expected[2:]) and expected[0]["reward_std"] > 0


@pytest.mark.parametrize("epochs", [1, 2])
def test_ppo_scores_a_rollout_of_one_batch_as_it_learns_from_it(
    epochs: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What policy and critic said before the first step is what they say in it; and what is learned is the same."""
    of_each_token, passes, runs = ppo.of_each_token, [], {}

    def counted(engine: Engine, *arguments: Any) -> torch.Tensor:
        passes.append(engine)
        return of_each_token(engine, *arguments)

    monkeypatch.setattr(ppo, "of_each_token", counted)
    for twice in (False, True):
        if twice:
            always = property(lambda _: True, lambda *_: None)
            monkeypatch.setattr(ppo.ActorCritic, "needs_old", always, raising=False)
        rollout = {"samples": 1, "epochs": epochs}
        config = make(folder, tmp_path / str(twice), rollout=rollout, train={"steps": 2 * epochs})
        assert run(config, "ppo") == 0
        runs[twice] = logged(config), len(passes)
        passes.clear()
    (once, n_once), (again, n_again) = runs[False], runs[True]
    assert (n_once, n_again) == (2 * 1, 2 * 3), "reference; and policy and critic"
    for got, want in zip(once, again, strict=True):
        assert got["val/ratio"] == pytest.approx(want["val/ratio"], rel=1e-9)
        assert (got["val/ratio"] == 1.0) == (got["step"] % epochs == 1 % epochs), "exactly 1 in a rollout's first step"
        assert got.keys() == want.keys()
        for name in want.keys() & {"loss", "grad_norm", "loss/value_avg", "objective/kl", "objective/non_score_reward"}:
            assert got[name] == pytest.approx(want[name], rel=1e-9, abs=1e-12), (want["step"], name)


def test_a_reward_model_judges(folder: Path, tmp_path: Path) -> None:
    scores = [{"kind": "model", "checkpoint": str(folder / "judge" / "checkpoints"), "name": "judge"}]
    config = make(folder, tmp_path, rollout={"scores": scores}, train={"steps": 2})
    assert run(config, "ppo") == 0
    assert logged(config)[0]["rewards/judge/std"] > 0


@pytest.mark.parametrize("base", ["full", "nf4"])
def test_adapters_learn_alone(base: str, folder: Path, tmp_path: Path, pool: RankPool) -> None:
    sections = {"rollout": {"tp": 1, "scores": [{"kind": "regex", "pattern": "e"}]}, "lora": {"rank": 2, "base": base}}
    model = {"hidden": 128, "ffn_hidden": 128} if base == "nf4" else {}
    config = make(folder, tmp_path, train={"steps": 2}, parallel={"tp": 2}, model=model, **sections)
    assert set(pool.run(2, run, config, "grpo")) == {0}
    assert logged(config)[1]["sampling/sampling_logp_difference/mean"] < 1e-9, "the sampler has the adapters too"


def test_the_policy_stops_when_it_has_moved_enough(folder: Path, tmp_path: Path) -> None:
    sections = {"rollout": {"samples": 1, "prompts": 8, "epochs": 2}, "train": {"steps": 4}, "ppo": {"stop_kl": 1e-9}}
    config = make(folder, tmp_path, **sections, optim={"lr": 0.1})
    assert run(config, "ppo") == 0
    assert [line["loss"] is None for line in logged(config)] == [False, False, True, True]


def test_wrong_recipes_end_before_a_model_exists(folder: Path, tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, Any], type[Exception], str]] = [
        ("grpo", {"rollout": {"samples": 1}}, ConfigError, "samples = 1 +must be 2 or more"),
        ("ppo", {"rollout": {"max_tokens": 30}}, DataError, r"prompts.jsonl, line \d.*must leave room .* 2 tokens"),
        ("ppo", {"rollout": {"stop": ["two tokens"]}}, ConfigError, "rollout.stop: 'two tokens' +must be one token"),
        (
            "grpo",
            {"rollout": {"scores": [{"kind": "function", "function": "nowhere:f"}]}},
            ConfigError,
            "nowhere:f +cannot be used: ModuleNotFoundError",
        ),
    ]
    for verb, sections, error, message in cases:
        config = make(folder, tmp_path / "run", **sections)
        with pytest.raises(error, match=message):
            run(config, verb)
    assert not (tmp_path / "run").exists()
    base = save_model(tmp_path / "base")
    config = make(folder, tmp_path / "run", rollout={"scores": [{"kind": "model", "checkpoint": str(base)}]})
    with pytest.raises(CheckpointError, match="is no reward model: it predicts tokens"):
        run(config, "grpo")
