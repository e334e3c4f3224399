"""GRPO and PPO beside TRL: CPU seconds of one thread for each new token, all that a rollout costs together.

    python tools/bench/reinforcement.py                          all methods, both contestants, in turn
    python tools/bench/reinforcement.py --methods ppo-4 --rounds 1

The same Llama (hidden 256, 4 layers, vocabulary 4096, 5.3 million parameters) in fp32, the same prompts of 32 tokens,
64 completions of 64 tokens a rollout; the end of a text is a token that the models cannot say, so that all are equally
long. GRPO: 8 completions of each of 8 prompts, a Python function as the reward, one optimizer step. PPO: one completion
of each of 64 prompts, a reward model and a critic of the policy's size, a frozen reference, and one step on the whole
rollout, or 4 of them (`ppo-4`, which is TRL's default).

TRL generates with transformers, as it does where vLLM is not there. Its PPO left the library after version 1.12: run
this in an environment with `trl==1.12.0`, or leave PPO out. Random words, since time does not depend on sense.
"""

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from in_turn import best_rates

VOCAB, COMPLETIONS, SAMPLES, PROMPT_TOKENS, NEW_TOKENS = 4096, 64, 8, 32, 64
EPOCHS = {"grpo": 1, "ppo-1": 1, "ppo-4": 4}  # of each method, in steps: how often a rollout is learned from
ROLLOUTS = 2  # that are timed, after a first
SHAPE = {"hidden": 256, "n_layers": 4, "n_heads": 8, "n_kv_heads": 8, "ffn_hidden": 704}
N_TIMED = ROLLOUTS * COMPLETIONS * NEW_TOKENS


def prompts(n: int) -> list[list[int]]:
    """Return the ids of n prompts, the same for both contestants."""
    drawn: list[list[int]] = np.random.default_rng(0).integers(0, VOCAB, (n, PROMPT_TOKENS)).tolist()
    return drawn


def reward(text: str) -> float:
    """Return a number that differs between completions."""
    return float(len(text) % 7)


def ours(method: str) -> float:
    """Return new tokens a CPU second."""
    from megascratch.align.grpo import GroupLearner, grpo_objective
    from megascratch.align.policy_losses import Aggregation
    from megascratch.align.ppo import ActorCritic, ppo_objective
    from megascratch.align.reference import frozen_engine
    from megascratch.align.reinforcement import critic_engine
    from megascratch.align.reward_model import RewardModel
    from megascratch.align.rewards import Reward, Verifier
    from megascratch.align.rollout import Question
    from megascratch.align.rollouts import Language, Learner, Rollouts
    from megascratch.align.scores import Judge, Scorer
    from megascratch.config import config_from_dict
    from megascratch.dist.launch import keep_freed_memory
    from megascratch.dist.mesh import Mesh
    from megascratch.engine import Engine
    from megascratch.log import make_console

    keep_freed_memory()
    samples, epochs = SAMPLES if method == "grpo" else 1, EPOCHS[method]
    asked = COMPLETIONS // samples
    n_steps = epochs * (1 + ROLLOUTS)
    rollout = {"prompts": asked, "samples": samples, "epochs": epochs, "max_tokens": NEW_TOKENS, "scores": [{}]}
    config = config_from_dict(
        {
            "model": {**SHAPE, "vocab_size": VOCAB, "max_seq_length": 128},
            "data": {"seq_length": PROMPT_TOKENS + NEW_TOKENS},
            "train": {"steps": n_steps, "global_batch": COMPLETIONS, "micro_batch": 16, "dtype": "fp32"},
            "rollout": rollout,
        }
    )
    mesh = Mesh.serial()
    engine = Engine(config, mesh)
    learner: Learner
    judge: Reward | Judge
    aggregation: Aggregation
    if method == "grpo":
        learner, aggregation = GroupLearner(engine), config.grpo.aggregation
        objective, judge = (
            grpo_objective(config),
            Verifier("length", lambda answered: reward(answered.completion), False),
        )
    else:
        learner, aggregation = ActorCritic(engine, critic_engine(config, mesh), frozen_engine(config, mesh)), "dapo"
        scalar = config.model_copy(update={"model": config.model.model_copy(update={"head": "scalar"})})
        objective, judge = ppo_objective(config), RewardModel(Engine(scalar, mesh, learns=False), "model")
    questions = [Question("", torch.tensor(ids), "", {}) for ids in prompts(asked)]
    language = Language(lambda ids: " ".join(map(str, ids)), [], VOCAB)
    source = Rollouts(engine, questions, language, Scorer([(judge, 1.0)], mesh), learner, aggregation, make_console(1))
    started = 0.0
    for step, batch in enumerate(source.steps(0, n_steps), start=1):
        source.observe(engine.train_step(batch, objective, keep=source.keep))
        if step == epochs:
            started = time.process_time()
    return N_TIMED / (time.process_time() - started)


def trl(method: str) -> float:
    """Return new tokens a CPU second."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

    words = {f"w{i}": i for i in range(VOCAB + 1)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end = f"w{VOCAB}"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end, padding_side="left")
    shape = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=SHAPE["hidden"],
        num_hidden_layers=SHAPE["n_layers"],
        num_attention_heads=SHAPE["n_heads"],
        num_key_value_heads=SHAPE["n_kv_heads"],
        intermediate_size=SHAPE["ffn_hidden"],
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
    )
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.process_time())

    model = LlamaForCausalLM(shape)
    trainer = grpo_trainer(model, fast) if method == "grpo" else ppo_trainer(model, fast, EPOCHS[method])
    trainer.add_callback(Clock())
    trainer.train()
    assert len(ends) == 1 + ROLLOUTS, "one step of TRL's trainers is one rollout here"
    return N_TIMED / (ends[-1] - ends[0])


COMMON = {"bf16": False, "report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}


def grpo_trainer(model: Any, tokenizer: Any) -> Any:
    """Return TRL's trainer for 1 + ROLLOUTS rollouts of one step."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    arguments = GRPOConfig(
        tempfile.mkdtemp(),
        per_device_train_batch_size=COMPLETIONS,
        num_generations=SAMPLES,
        max_completion_length=NEW_TOKENS,
        max_steps=1 + ROLLOUTS,
        logging_strategy="no",
        **COMMON,
    )
    asked = [" ".join(f"w{i}" for i in ids) for ids in prompts(COMPLETIONS // SAMPLES)]
    return GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [reward(text) for text in completions],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": asked * (1 + ROLLOUTS)}),
        processing_class=tokenizer,
    )


def ppo_trainer(model: Any, tokenizer: Any, epochs: int) -> Any:
    """Return TRL's trainer for 1 + ROLLOUTS rollouts of so many steps."""
    from datasets import Dataset
    from transformers import LlamaForSequenceClassification

    try:
        from trl.experimental.ppo import PPOConfig, PPOTrainer
    except ImportError:
        sys.exit("this version of trl has no PPO: give one that has (trl==1.12.0), or --methods grpo")
    arguments = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=COMPLETIONS,
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=epochs,
        total_episodes=COMPLETIONS * (1 + ROLLOUTS),
        response_length=NEW_TOKENS,
        local_rollout_forward_batch_size=COMPLETIONS,
        num_sample_generations=0,
        temperature=1.0,
        gradient_checkpointing=False,
        logging_strategy="no",
        **COMMON,
    )
    shape = copy.deepcopy(model.config)
    shape.num_labels = 1
    judge, critic = LlamaForSequenceClassification(shape), LlamaForSequenceClassification(shape)
    asked = Dataset.from_dict({"input_ids": prompts(COMPLETIONS)})
    return PPOTrainer(
        args=arguments,
        processing_class=tokenizer,
        model=model,
        ref_model=copy.deepcopy(model),
        reward_model=judge,
        value_model=critic,
        train_dataset=asked,
        eval_dataset=asked,
    )


CONTESTANTS: dict[str, Callable[[str], float]] = {"ours": ours, "trl": trl}


def main() -> None:
    """Measure in turn, each in a process of its own, and print each one's best round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--methods", nargs="*", default=list(EPOCHS), choices=EPOCHS)
    parser.add_argument("--run", nargs=2, metavar=("CONTESTANT", "METHOD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        print(CONTESTANTS[args.run[0]](args.run[1]))
        return
    best = best_rates(__file__, args.methods, CONTESTANTS, args.rounds)
    print(f"{'':6}{'ours':>8}{'TRL':>8}{'ratio':>8}   new tokens a CPU second")
    for method in args.methods:
        mine, theirs = best[method, "ours"], best[method, "trl"]
        print(f"{method:6}{mine:8,.0f}{theirs:8,.0f}{mine / theirs:7.2f}×")


if __name__ == "__main__":
    main()
