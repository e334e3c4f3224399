#!/usr/bin/env python3
"""Convert checkpoints with the flags of Megatron-LM's tools/checkpoint/convert.py.

The same scripts run unchanged on our checkpoints, on Megatron-LM's own and on Hugging Face folders; a flag that changes
nothing here is accepted and said, one that can't be honoured is refused. Optimizer state of ours goes along, where
Megatron's tool leaves it out. The work is done by megascratch.checkpoint.

    python tools/convert_checkpoint.py --model-type GPT --loader mcore --saver mcore --load-dir runs/a/checkpoints \\
        --save-dir runs/a/tp1 --target-tensor-parallel-size 1 --target-pipeline-parallel-size 1
    python tools/convert_checkpoint.py --model-type GPT --loader llama_mistral --checkpoint-type hf --bf16 \\
        --model-size llama3 --tokenizer-model models/llama --saver mcore --load-dir models/llama --save-dir runs/llama
"""

import argparse
import sys
from pathlib import Path

from megascratch.checkpoint import convert, describe
from megascratch.checkpoint.convert import recognised
from megascratch.errors import CheckpointError, Problem, exit_code_of
from megascratch.log import make_console

HERE = "the flags of convert_checkpoint.py"
OURS = ("megatron", "legacy", "mcore", "core")  # Megatron's names for its own formats stand for ours
HF_LOADERS = ("llama_mistral", "hf")
HF_SAVERS = ("hf", "llama_hf", "qwen2_hf")


def parse_flags(argv: list[str]) -> argparse.Namespace:
    """Return Megatron's flags: the tool's own, and those of the loaders and savers that stand for ours."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model-type", required=True, choices=["GPT", "BERT"], help="GPT")
    parser.add_argument("--loader", default="megatron", help=f"ours: {', '.join(OURS)}; else {', '.join(HF_LOADERS)}")
    parser.add_argument("--saver", default="megatron", help=f"ours: {', '.join(OURS)}; else {', '.join(HF_SAVERS)}")
    parser.add_argument("--load-dir", required=True, type=Path, help="a checkpoint, a directory of them, or a folder")
    parser.add_argument("--save-dir", required=True, type=Path, help="must not exist")
    parser.add_argument("--target-tensor-parallel-size", type=int, help="as it was saved when left out")
    parser.add_argument("--target-pipeline-parallel-size", type=int, help="as it was saved when left out")
    parser.add_argument("--target-expert-parallel-size", type=int, default=1, help="must be 1")

    loader = parser.add_argument_group("loader llama_mistral")
    loader.add_argument("--checkpoint-type", choices=["meta", "hf"], default="hf", help="must be hf")
    loader.add_argument("--bf16", action="store_true", help="convert the weights")
    loader.add_argument("--fp16", action="store_true", help="convert the weights")
    loader.add_argument("--model-size", help="no effect: config.json says")
    loader.add_argument("--tokenizer-model", type=Path, help="goes along to --saver hf; no effect otherwise")

    unneeded = parser.add_argument_group("no effect here")
    for flag in ("--megatron-path", "--vocab-file", "--loader-transformer-impl", "--saver-transformer-impl"):
        unneeded.add_argument(flag)
    for flag in ("--max-queue-size", "--true-vocab-size", "--make-vocab-size-divisible-by"):
        unneeded.add_argument(flag, type=int)
    unneeded.add_argument("--position-embedding-type", help="the checkpoint says")
    unneeded.add_argument("--no-checking", action="store_true", help="checksums are always checked")
    return parser.parse_args(argv)


def refuse(flags: argparse.Namespace) -> None:
    """Refuse what we cannot do.

    Raises: CheckpointError: with every such flag.
    """
    problems = []
    if flags.model_type != "GPT":
        problems.append(Problem(f"--model-type {flags.model_type}", "must be GPT", "use Megatron-LM's own tool"))
    if flags.loader not in OURS + HF_LOADERS:
        problems.append(Problem(f"--loader {flags.loader}", f"must be one of {', '.join(OURS + HF_LOADERS)}"))
    if flags.saver not in OURS + HF_SAVERS:
        problems.append(Problem(f"--saver {flags.saver}", f"must be one of {', '.join(OURS + HF_SAVERS)}"))
    if flags.checkpoint_type != "hf":
        remedy = "download the model in Hugging Face's format"
        problems.append(Problem("--checkpoint-type meta", "Meta's files are pickles", remedy))
    if flags.target_expert_parallel_size != 1:
        problems.append(Problem("--target-expert-parallel-size", "must be 1: there are no experts"))
    if flags.bf16 and flags.fp16:
        problems.append(Problem("--bf16 and --fp16", "exclude each other", "give one"))
    if (flags.bf16 or flags.fp16) and flags.loader not in HF_LOADERS:
        problems.append(Problem("--bf16 or --fp16", "belongs to --loader llama_mistral", "leave it out"))
    if flags.loader in HF_LOADERS and flags.saver in HF_SAVERS:
        problems.append(Problem("--loader and --saver", "are both Hugging Face's format", "copy the folder"))
    sizes = (flags.target_tensor_parallel_size, flags.target_pipeline_parallel_size)
    if any(size is not None and size < 1 for size in sizes):
        problems.append(Problem("--target-*-parallel-size", "must be at least 1"))
    if flags.save_dir.exists():
        problems.append(Problem(f"--save-dir {flags.save_dir}", "exists already", "give another directory"))
    if problems:
        raise CheckpointError(problems, HERE)


def notes(flags: argparse.Namespace) -> list[str]:
    """Return a line for each flag that was given and changes nothing."""
    reasons = {
        "megatron_path": "nothing of Megatron-LM is needed",
        "vocab_file": "padding of the vocabulary is never stored",
        "true_vocab_size": "padding of the vocabulary is never stored",
        "make_vocab_size_divisible_by": "padding of the vocabulary is never stored",
        "loader_transformer_impl": "there is one layout of weights",
        "saver_transformer_impl": "there is one layout of weights",
        "position_embedding_type": "the checkpoint says",
        "max_queue_size": "there is no queue: one piece is in memory at a time",
        "no_checking": "checksums are always checked",
    }
    given = [name for name in reasons if getattr(flags, name)]
    return [f"--{name.replace('_', '-')} has no effect: {reasons[name]}" for name in given]


def run(flags: argparse.Namespace) -> None:
    """Do what the flags say, and print what was done."""
    refuse(flags)
    console = make_console()
    for line in notes(flags):
        console.print(f"note: {line}")
    from_hf, to_hf = flags.loader in HF_LOADERS, flags.saver in HF_SAVERS
    # Of ours, a size that was left out stays what it was.
    own = not from_hf and recognised(flags.load_dir) == "megascratch"
    saved = describe(flags.load_dir).layout if own else {}
    tp, pp = flags.target_tensor_parallel_size, flags.target_pipeline_parallel_size
    convert(
        flags.load_dir,
        flags.save_dir,
        from_="hf" if from_hf else None,
        to="hf" if to_hf else "megascratch",
        tp=tp or saved.get("tp", 1),
        pp=pp or saved.get("pp", 1),
        dtype="bf16" if flags.bf16 else "fp16" if flags.fp16 else None,
        tokenizer=flags.tokenizer_model if to_hf else None,
        console=console,
    )
    print(f"{flags.load_dir} → {flags.save_dir}")


def main(argv: list[str]) -> int:
    """Return the exit code: 2 when the user's input is wrong."""
    return exit_code_of(lambda: run(parse_flags(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
