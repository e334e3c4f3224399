"""GRPO beside TRL: CPU seconds of one thread for each new token, generation, reward, scoring and update together.

    python tools/bench/grpo.py              both, in turn
    python tools/bench/grpo.py --one trl    one of them

The same Llama (hidden 256, 4 layers, vocabulary 4096, 5.3 million parameters), fp32, 8 prompts of 32 tokens, 8
completions of 64 tokens each, one optimizer step a rollout. TRL generates with transformers, as it does where vLLM is
not there. Needs trl; random words, since time does not depend on sense.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch

VOCAB, PROMPTS, SAMPLES, PROMPT_TOKENS, NEW_TOKENS, STEPS = 4096, 8, 8, 32, 64, 3
SHAPE = {"hidden": 256, "n_layers": 4, "n_heads": 8, "n_kv_heads": 8, "ffn_hidden": 704}


def ours() -> float:
    """Return new tokens a CPU second."""
    from megascratch.align.grpo import GroupLearner, grpo_objective
    from megascratch.align.rewards import Verifier
    from megascratch.align.rollout import Question
    from megascratch.align.rollouts import Language, Rollouts
    from megascratch.align.scores import Scorer
    from megascratch.config import config_from_dict
    from megascratch.dist.mesh import Mesh
    from megascratch.engine import Engine
    from megascratch.log import make_console

    n = PROMPTS * SAMPLES
    rollout = {"prompts": PROMPTS, "samples": SAMPLES, "max_tokens": NEW_TOKENS, "scores": [{"kind": "number"}]}
    config = config_from_dict(
        {
            "model": {**SHAPE, "vocab_size": VOCAB, "max_seq_length": 128},
            "data": {"seq_length": PROMPT_TOKENS + NEW_TOKENS},
            "train": {"steps": STEPS + 1, "global_batch": n, "micro_batch": 16, "dtype": "fp32"},
            "rollout": rollout,
        }
    )
    engine = Engine(config, Mesh.serial())
    questions = [Question("", torch.randint(1, VOCAB, (PROMPT_TOKENS,)), "", {}) for _ in range(PROMPTS)]
    scorer = Scorer([(Verifier("length", lambda a: float(len(a.completion) % 7), False), 1.0)], engine.mesh)
    language = Language(lambda ids: " ".join(map(str, ids)), [0], VOCAB)
    source = Rollouts(engine, questions, language, scorer, GroupLearner(engine), "dapo", make_console(1))
    objective = grpo_objective(config)
    n_tokens, started = 0.0, 0.0
    for step, batch in enumerate(source.steps(0, STEPS + 1)):
        engine.train_step(batch, objective)
        values = source.observe(None)  # type: ignore[arg-type]  # the group's learner does not look at it
        if step == 0:
            started = time.process_time()
        else:
            n_tokens += values["completions/mean_length"] * n
    return n_tokens / (time.process_time() - started)


def trl() -> float:
    """Return new tokens a CPU second."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0", pad_token="w0")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=SHAPE["hidden"],
            num_hidden_layers=SHAPE["n_layers"],
            num_attention_heads=SHAPE["n_heads"],
            num_key_value_heads=SHAPE["n_kv_heads"],
            intermediate_size=SHAPE["ffn_hidden"],
            max_position_embeddings=128,
        )
    )
    prompts = [" ".join(f"w{i}" for i in torch.randint(1, VOCAB, (PROMPT_TOKENS,)).tolist()) for _ in range(PROMPTS)]
    clock: dict[str, float] = {}

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                clock["started"] = time.process_time()
            elif state.global_step == STEPS + 1:
                clock["ended"] = time.process_time()

    arguments = GRPOConfig(
        tempfile.mkdtemp(),
        per_device_train_batch_size=PROMPTS * SAMPLES,
        num_generations=SAMPLES,
        max_completion_length=NEW_TOKENS,
        max_steps=STEPS + 1,
        bf16=False,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [float(len(text) % 7) for text in completions],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": prompts * (STEPS + 1)}),
        processing_class=fast,
        callbacks=[Clock()],
    )
    trainer.train()
    return STEPS * PROMPTS * SAMPLES * NEW_TOKENS / (clock["ended"] - clock["started"])


def main() -> None:
    """Measure both in turn, each in a process of its own, or the one that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", choices=("ours", "trl"))
    asked = parser.parse_args().one
    if asked is None:
        for name in ("ours", "trl", "ours", "trl"):
            subprocess.run([sys.executable, __file__, "--one", name], check=True)
        return
    torch.set_num_threads(1)
    torch.manual_seed(0)
    speed = {"ours": ours, "trl": trl}[asked]()
    print(f"{asked:5}{speed:>8,.0f} new tokens a CPU second", flush=True)


if __name__ == "__main__":
    main()
