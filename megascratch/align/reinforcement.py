"""GRPO and PPO as ways of training: prompts, rewards and models put together."""

from dataclasses import replace
from pathlib import Path

from megascratch.align.completions_log import CompletionsLog
from megascratch.align.grpo import GroupLearner, grpo_objective
from megascratch.align.policy_losses import Aggregation
from megascratch.align.ppo import ActorCritic, ppo_objective
from megascratch.align.questions import language_of, read_questions
from megascratch.align.reference import frozen_engine
from megascratch.align.reward_model import RewardModel
from megascratch.align.rewards import FunctionReward, Reward, number_verifier, regex_verifier
from megascratch.align.rollouts import Learner, Rollouts
from megascratch.align.scores import Judge, Scorer
from megascratch.align.sources import keep_template
from megascratch.config import Config, ScoreConfig
from megascratch.dist.mesh import Mesh
from megascratch.engine import Begin, Engine, Objective, Task
from megascratch.engine.state import load_weights
from megascratch.errors import ConfigError, Problem
from megascratch.log import make_console


def grpo(config: Config, mesh: Mesh) -> Begin:
    """Improve a policy by comparing completions of the same prompt.

    Raises: UserError: if prompts, rewards or models cannot be used.
    """
    require_rollouts(config)
    assert config.rollout is not None
    if config.rollout.samples < 2:
        rule = "must be 2 or more: GRPO compares completions of one prompt"
        raise ConfigError(Problem(f"rollout.samples = {config.rollout.samples}", rule, "8 is usual"))
    source = _Source(config, mesh)

    def begin(engine: Engine) -> Task:
        reference = frozen_engine(config, mesh) if config.grpo.kl_coeff > 0 else None
        learner = GroupLearner(engine, reference)
        return source.task(engine, grpo_objective(config), learner, config.grpo.aggregation)

    return begin


def ppo(config: Config, mesh: Mesh) -> Begin:
    """Improve a policy with a critic beside it and a reference behind it.

    Raises: UserError: if prompts, rewards or models cannot be used.
    """
    require_rollouts(config)
    source = _Source(config, mesh)

    def begin(engine: Engine) -> Task:
        learner = ActorCritic(engine, critic_engine(config, mesh), frozen_engine(config, mesh))
        task = source.task(engine, ppo_objective(config), learner, config.ppo.aggregation)
        return replace(
            task,
            companions={"critic": learner.critic},
            state=lambda: {"ppo": learner.state()},
            restore=lambda state: learner.restore(state.get("ppo", {})),
        )

    return begin


def require_rollouts(config: Config) -> None:
    """Raise for a recipe that does not say how to roll out."""
    if config.rollout is None:
        raise ConfigError(Problem("rollout", "must be given: how completions are sampled and scored", "see [rollout]"))


def critic_engine(config: Config, mesh: Mesh) -> Engine:
    """Return the critic of a new run: a scalar head on the weights that `ppo.critic` names, or the policy's own."""
    model = config.model.model_copy(update={"head": "scalar"})
    optim = config.optim.model_copy(update={"lr": config.ppo.critic_lr or config.optim.lr})
    engine = Engine(config.model_copy(update={"model": model, "optim": optim}), mesh)
    start = config.ppo.critic or config.checkpoint.init
    if start is not None:
        load_weights(engine, Path(start))
    return engine


def make_reward(score: ScoreConfig, config: Config, mesh: Mesh) -> Reward | Judge:
    """Return the reward that a recipe describes.

    Raises: UserError: if it cannot be used.
    """
    match score.kind:
        case "function":
            assert score.function is not None
            return FunctionReward(score.function, score.timeout_s, name=score.name)
        case "regex":
            assert score.pattern is not None
            return regex_verifier(score.pattern, score.timeout_s, score.name or "regex")
        case "number":
            return number_verifier(score.name or "number")
        case "model":
            assert score.checkpoint is not None
            return RewardModel.open(Path(score.checkpoint), config, mesh, score.name or "model")


class _Source:
    """What both methods read before a model exists."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        assert config.rollout is not None
        self.config, self.mesh, self.console = config, mesh, make_console(mesh.rank)
        self.questions, self.language = read_questions(config, self.console), language_of(config)
        rewards = [(make_reward(score, config, mesh), score.weight) for score in config.rollout.scores]
        self.scorer = Scorer(rewards, mesh, fails=config.rollout.missing_score == "fail")

    def task(self, engine: Engine, objective: Objective, learner: Learner, aggregation: Aggregation) -> Task:
        """Return what a method trains on."""
        config, rollout = self.config, self.config.rollout
        assert rollout is not None
        keep_template(config, self.mesh)
        log = CompletionsLog(Path(config.log.dir), rollout.log_completions) if self.mesh.rank == 0 else None
        source = Rollouts(engine, self.questions, self.language, self.scorer, learner, aggregation, self.console, log)
        per_rollout = rollout.steps(config.train.global_batch)
        return Task(objective, source, resumable_every=per_rollout, keep=source.keep, observe=source.observe)
