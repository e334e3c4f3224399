#!/usr/bin/env python3
"""Fine-tuning beside TRL: CPU time of a training step on the same tiny Llama, the same conversations, one thread.

    python tools/bench/align.py --rounds 3

Each contestant runs in a process of its own, in turn, round after round; the best round of each is what counts, as
everything else on the machine only adds. TRL's trainers are used as they are: fp32, fused AdamW, no gradient
checkpointing, padding to the longest of a batch, and for DPO the reference's log-probabilities precomputed, as ours
are. Every step learns from the very same conversations on both sides; ours packs them into rows. Tokens are those of
the conversations, padding not counted.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from in_turn import best_rates

HIDDEN, N_LAYERS, N_HEADS, FFN, VOCAB, S = 256, 4, 4, 688, 4096, 256
BATCH, N_STEPS, WARM_UP = 8, 6, 2
LR, CLIP = 1e-4, 1.0
TARGETS = {"sft": 1.4, "dpo": 1.6}

Ids = list[int]


def conversations(method: str, lengths: str) -> list[list[list[tuple[Ids, int]]]]:
    """Return the examples of each step, of one sequence, or of two with the same prompt: ids, how many are prompt."""
    random = np.random.default_rng(7)
    n_answers = 1 if method == "sft" else 2

    def example() -> list[tuple[Ids, int]]:
        longest = S if lengths == "equal" else int(random.integers(S // 4, S + 1))
        n_prompt = longest // 3
        prompt = random.integers(1, VOCAB, n_prompt).tolist()
        return [(prompt + random.integers(1, VOCAB, longest - n_prompt).tolist(), n_prompt) for _ in range(n_answers)]

    return [[example() for _ in range(BATCH // n_answers)] for _ in range(N_STEPS + WARM_UP)]


def run_ours(method: str, steps: list[list[list[tuple[Ids, int]]]], folder: Path) -> list[float]:
    """Return the CPU seconds of each step."""
    import torch

    from megascratch.align.dpo import pair_objective
    from megascratch.align.examples import Example, TokenSequence
    from megascratch.align.reference import reference_of
    from megascratch.align.rows import Rows, collate_rows
    from megascratch.align.sft import completion_tokens
    from megascratch.config import DpoConfig, config_from_dict
    from megascratch.dist.launch import keep_freed_memory
    from megascratch.dist.mesh import Mesh
    from megascratch.engine import Engine, Objective

    torch.set_num_threads(1)
    keep_freed_memory()

    def example(sequences: list[tuple[Ids, int]]) -> Example:
        made = (TokenSequence(np.array(ids, np.int32), np.arange(len(ids)) >= n) for ids, n in sequences)
        return Example("", tuple(made), {})

    seq_length, first_answer, rows = 2 * S, 0, []
    for examples in steps:
        rows.append(Rows([example(one) for one in examples], seq_length, True, None, first_answer=first_answer))
        first_answer += rows[-1].n_answers
    model = {"n_layers": N_LAYERS, "hidden": HIDDEN, "n_heads": N_HEADS, "ffn_hidden": FFN, "vocab_size": VOCAB}
    config = config_from_dict(
        {
            "model": {**model, "max_seq_length": seq_length},
            "data": {"seq_length": seq_length, "split": "1"},
            "train": {"global_batch": 4, "micro_batch": 4, "dtype": "fp32", "steps": len(steps)},
            "optim": {"lr": LR, "clip": CLIP, "beta2": 0.999, "weight_decay": 0.0, "schedule": "linear"},
            "chat": {},
            "log": {"dir": str(folder)},
        }
    )
    mesh = Mesh.serial()
    engine = Engine(config, mesh)
    objective: Objective = completion_tokens if method == "sft" else pair_objective(DpoConfig())
    complete = reference_of(config, mesh, engine, rows, "precomputed") if method == "dpo" else None
    seconds = []
    for part in rows:
        start = time.process_time()
        batch = [collate_rows(part, range(part.epoch_samples))]
        engine.train_step(complete(batch) if complete else batch, objective)
        seconds.append(time.process_time() - start)
    return seconds


def run_trl(method: str, steps: list[list[list[tuple[Ids, int]]]], folder: Path) -> list[float]:
    """Return the CPU seconds of each step but the first, whose beginning the trainer does not tell."""
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from torch.utils.data import SequentialSampler
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    torch.set_num_threads(1)
    examples = list(itertools.chain(*steps))
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1", unk_token="w0")
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=HIDDEN,
            num_hidden_layers=N_LAYERS,
            num_attention_heads=N_HEADS,
            intermediate_size=FFN,
            vocab_size=VOCAB,
            max_position_embeddings=2 * S,
            pad_token_id=0,
        )
    )
    per_step = BATCH if method == "sft" else BATCH // 2
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": N_STEPS + WARM_UP,
        "per_device_train_batch_size": per_step,
        "learning_rate": LR,
        "max_grad_norm": CLIP,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "max_length": S,
    }
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.process_time())

    if method == "sft":
        rows = [{"input_ids": ids, "completion_mask": [0] * n + [1] * (len(ids) - n)} for [(ids, n)] in examples]
        trainer: Any = SFTTrainer(
            model,
            SFTConfig(**arguments, completion_only_loss=True, shuffle_dataset=False),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
    else:
        rows = [
            {"prompt_ids": chosen[:n], "chosen_ids": chosen[n:], "rejected_ids": rejected[n:]}
            for [(chosen, n), (rejected, _)] in examples
        ]
        DPOTrainer._prepare_dataset = lambda self, dataset, *_, **__: dataset  # these are token ids already
        trainer = DPOTrainer(
            model,
            args=DPOConfig(**arguments, precompute_ref_log_probs=True),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
    trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)
    trainer.train()
    return [b - a for a, b in itertools.pairwise(seconds)]


CONTESTANTS: dict[str, Callable[..., list[float]]] = {"ours": run_ours, "trl": run_trl}


def rate(steps: list[list[list[tuple[Ids, int]]]], seconds: Sequence[float]) -> float:
    """Return tokens a CPU second of the steps after the first ones; `seconds` are of the last steps."""
    n_tokens = sum(len(ids) for step in steps[WARM_UP:] for example in step for ids, _ in example)
    return n_tokens / sum(seconds[-N_STEPS:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=["sft", "dpo"], choices=["sft", "dpo"])
    parser.add_argument("--lengths", default="mixed", choices=["mixed", "equal"])
    parser.add_argument("--run", nargs=2, metavar=("CONTESTANT", "METHOD"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        contestant, method = args.run
        steps = conversations(method, args.lengths)
        with tempfile.TemporaryDirectory() as folder:
            print(rate(steps, CONTESTANTS[contestant](method, steps, Path(folder))))
        return
    found = best_rates(__file__, args.methods, CONTESTANTS, args.rounds, "--lengths", args.lengths)
    print(f"{'':5}{'ours':>8}{'TRL':>8}{'ratio':>8}{'target':>8}   tokens per core-second, lengths {args.lengths}")
    for method in args.methods:
        ours, trl = found[method, "ours"], found[method, "trl"]
        print(f"{method:5}{ours:8.0f}{trl:8.0f}{ours / trl:7.2f}×{TARGETS[method]:7.1f}×")


if __name__ == "__main__":
    main()
