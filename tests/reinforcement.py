"""What it takes to run GRPO and PPO on a tiny model of `layouts.py`: questions, a reward, engines beside the policy."""

from typing import Any

import torch

from megascratch.align.grpo import GroupLearner, grpo_objective
from megascratch.align.policy_losses import Aggregation
from megascratch.align.ppo import ActorCritic, ppo_objective
from megascratch.align.rewards import Verifier
from megascratch.align.rollout import Question
from megascratch.align.rollouts import Language, Rollouts
from megascratch.align.scores import Scorer
from megascratch.config import Config, config_from_dict
from megascratch.engine import Engine, Task
from megascratch.log import make_console

LANGUAGE = Language(lambda ids: " ".join(map(str, ids)), stop_ids=range(0, 61, 9), n_ids=61)
QUESTIONS = [
    Question(f"questions, line {i}", torch.arange(1 + i % 4) * 7 + i, f"question {i}", {"answer": i}) for i in range(6)
]


def low_ids(answered: Any) -> float:
    """A reward that a tiny model can learn: the share of ids below 30, less for question 5, which is the hardest."""
    ids = [int(word) for word in answered.completion.split()]
    return sum(id < 30 for id in ids) / max(1, len(ids)) - 0.1 * (answered.record["answer"] == 5)


def reinforced(config: Config, sections: dict[str, Any]) -> Config:
    """Return a configuration of `layouts.make_config` that learns from rollouts of 8 completions, twice each.

    Completions have at most 12 tokens, so that rows have room for some where they are packed.
    """
    raw = config.model_dump(mode="json")
    if config.data.reset_attention_mask:
        raw["data"]["seq_length"] = 32
    rollout = {
        "prompts": 2,
        "samples": 4,
        "epochs": 2,
        "max_tokens": 8,
        "temperature": 1.3,
        "scores": [{"kind": "number"}],
    }
    return config_from_dict({**raw, **sections, "rollout": {**rollout, **sections.get("rollout", {})}})


def beside(engine: Engine, learns: bool = True, **changes: Any) -> Engine:
    """Return another engine on the same mesh."""
    config = engine.config
    for section, values in changes.items():
        config = config.model_copy(update={section: getattr(config, section).model_copy(update=values)})
    return Engine(config, engine.mesh, learns)


def make_task(engine: Engine, method: str) -> tuple[Task, Rollouts]:
    """Return what a kind of PPO, or any other method, which is a kind of GRPO, trains an engine on; and its source."""
    reference = beside(engine, learns=False, train={"seed": 99})
    scorer = Scorer([(Verifier("low_ids", low_ids, needs_answer=False), 1.0)], engine.mesh)
    companions: dict[str, Engine] = {}
    learner: GroupLearner | ActorCritic
    how: Aggregation
    if method.startswith("ppo"):
        critic = beside(engine, model={"head": "scalar"}, train={"seed": 5})
        companions["critic"] = critic
        learner, objective, how = ActorCritic(engine, critic, reference), ppo_objective(engine.config), "dapo"
    else:
        learner, objective = GroupLearner(engine, reference), grpo_objective(engine.config)
        how = engine.config.grpo.aggregation
    source = Rollouts(engine, QUESTIONS, LANGUAGE, scorer, learner, how, make_console(1))
    per_rollout = engine.config.rollout.steps(engine.config.train.global_batch)  # type: ignore[union-attr]
    state = {"state": learner.state, "restore": learner.restore} if isinstance(learner, ActorCritic) else {}
    hooks = {"keep": source.keep, "observe": source.observe, **state}
    task = Task(objective, source, resumable_every=per_rollout, companions=companions, **hooks)  # type: ignore[arg-type]
    return task, source
