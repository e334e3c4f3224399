"""Sections of reinforcement learning: how completions are sampled and scored, and what is learned from them."""

from typing import Annotated, Literal

from pydantic import Field

from megascratch.config.section import Count, Fraction, NotNegative, Positive, Section, Share, Whole

Lambda = Annotated[float, Field(ge=0, le=1)]


class ScoreConfig(Section):
    """Where a part of a completion's reward comes from; `align.rewards` says what each kind does."""

    kind: Literal["function", "regex", "number", "model"] = "number"
    function: str | None = None  # module:function
    pattern: str | None = None
    checkpoint: str | None = None  # of a reward model
    name: str | None = None  # in metrics; the function's, or the kind, when left out
    weight: float = 1.0
    timeout_s: Positive = 10.0  # a call that takes longer has no score


class RolloutConfig(Section):
    """How completions are sampled from the policy in training, and how often each is learned from.

    A rollout has `prompts` × `samples` completions. They are learned from in steps of `train.global_batch`, `epochs`
    times over.
    """

    prompts: Count = 8
    samples: Count = 1  # of each prompt; GRPO compares them with each other
    epochs: Count = 1
    max_tokens: Count = 128  # of a completion
    temperature: Positive = 1.0
    top_k: Whole = 0
    top_p: Share = 1.0
    stop: list[str] = []  # tokens that end a completion, besides the end of the document
    batch: Count = 256  # completions that a replica generates at once
    tp: Count | None = None  # tensor-parallel ranks of a replica; those of training when left out
    mask_truncated: bool = False  # learn nothing from completions that did not end by themselves
    scores: list[ScoreConfig] = []  # the reward is their weighted sum
    missing_score: Literal["skip", "fail"] = "skip"  # skip: a completion without one is reported, and not learned from
    missing_end_penalty: NotNegative = 0.0  # taken from the reward of a completion that did not end by itself
    # Tokens are weighed by how likely the trainer was to choose them, over the sampler, at most this much.
    importance_cap: Positive | None = 2.0
    importance_level: Literal["token", "sequence"] = "token"
    log_completions: Whole = 4  # of each rollout, into completions.jsonl

    @property
    def n_completions(self) -> int:
        """Completions of a rollout."""
        return self.prompts * self.samples

    def steps(self, global_batch: int) -> int:
        """Return the training steps of a rollout."""
        return self.epochs * self.n_completions // global_batch


class GrpoConfig(Section):
    """Group-relative policy optimisation and its variants: no critic, a prompt's completions are each other's measure.

    Dr. GRPO is baseline and aggregation dr_grpo; DAPO clip_high 0.28 and aggregation dapo; GSPO ratio sequence; RLOO
    baseline rloo and ratio sequence.
    """

    baseline: Literal["trl", "verl", "openrlhf", "megatron", "dr_grpo", "rloo"] = "trl"
    aggregation: Literal["grpo", "bnpo", "dapo", "dr_grpo"] = "dapo"
    ratio: Literal["token", "sequence"] = "token"
    clip_low: Fraction = 0.2
    clip_high: Positive = 0.2
    dual_clip: Positive | None = None
    log_ratio_clamp: Positive | None = None
    kl_coeff: NotNegative = 0.0  # of the divergence from checkpoint.init, in the loss
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_clamp: Literal["none", "verl", "openrlhf"] = "none"


class PpoConfig(Section):
    """Proximal policy optimisation: actor, critic, and a reference whose divergence is taken from the rewards."""

    clip_low: Fraction = 0.2
    clip_high: Positive = 0.2
    dual_clip: Positive | None = None
    log_ratio_clamp: Positive | None = None
    aggregation: Literal["grpo", "bnpo", "dapo", "dr_grpo"] = "dapo"
    gamma: Share = 1.0
    lam: Lambda = 0.95
    gae_masked: Literal["carry", "plain"] = "carry"
    whiten_advantages: bool = True
    whiten_rewards: bool = False
    whiten_variance: Literal["sample", "population"] = "sample"
    kl_coeff: NotNegative = 0.05  # of the divergence at each token, taken from its reward
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    kl_clamp: Literal["none", "verl", "openrlhf"] = "none"
    kl_target: Positive | None = None  # of a completion, in nats: kl_coeff is steered towards it
    kl_horizon: Count = 10_000  # completions
    stop_kl: Positive | None = None  # leave a rollout once a step has moved a token this far on average, in nats
    critic: str | None = None  # a checkpoint to begin with: a reward model, or a decoder; checkpoint.init when left out
    critic_lr: Positive | None = None  # optim.lr when left out
    value_clip: Positive | None = 0.2
