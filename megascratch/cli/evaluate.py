"""`megascratch eval`: how well a checkpoint predicts a dataset, or answers questions."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megascratch.errors import ConfigError, Problem

if TYPE_CHECKING:
    from megascratch.dist.launch import Environment


@dataclass(frozen=True)
class Exam:
    """Which questions a checkpoint is to answer, and on how many ranks."""

    checkpoint: Path
    questions: Path
    tokenizer: Path | None
    max_tokens: int
    stop: tuple[str, ...]
    batch: int
    tp: int
    dp: int


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a directory with `latest`.")],
    data: Annotated[Path | None, typer.Option(help="A dataset's prefix, without .bin and .idx.")] = None,
    questions: Annotated[
        Path | None, typer.Option(help="JSON Lines: context, choices, answer; or prompt, answer.")
    ] = None,
    seq_length: Annotated[int | None, typer.Option(help="Tokens a window; that of training when left out.")] = None,
    batches: Annotated[int | None, typer.Option(help="Micro-batches to read; all when left out.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="The checkpoint's own when left out.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer without choices.")] = 64,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends such an answer; a new line by default.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Questions that are answered at once.")] = 16,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks that answer questions.")] = 1,
    dp: Annotated[int, typer.Option(min=1, help="Replicas that share the questions.")] = 1,
) -> None:
    """Print perplexity, nats a token and bits a byte on a dataset, or the share of questions answered rightly."""
    if (data is None) == (questions is None):
        raise ConfigError(Problem("--data and --questions", "one of them must be given"), "the options of eval")
    if questions is not None:
        from megascratch.cli.ranks import run_ranks

        stops = tuple(["\n"] if stop is None else stop)
        exam = Exam(checkpoint, questions, tokenizer, max_tokens, stops, batch, tp, dp)
        raise typer.Exit(run_ranks(print_shares, exam, tp * dp))
    assert data is not None
    _print_perplexity(checkpoint, data, seq_length, batches, tokenizer)


def print_shares(exam: Exam, env: "Environment | None") -> int:
    """Run one rank of an exam; rank 0 prints. Returns: the exit code."""
    from contextlib import nullcontext

    from megascratch.dist.launch import Environment, process_group, share_cores
    from megascratch.dist.mesh import Mesh, MeshSpec
    from megascratch.errors import EXIT_DONE
    from megascratch.evals import Examinee, examine, read_questions

    env = env or Environment(rank=0, world_size=1, local_rank=0, local_world_size=1)
    share_cores(env.local_world_size)
    asked = read_questions(exam.questions)  # before the weights are read
    with process_group(env) if env.world_size > 1 else nullcontext():
        mesh = Mesh.create(MeshSpec(tp=exam.tp, dp=exam.dp), env.device)
        examinee = Examinee.open(exam.checkpoint, mesh, exam.tokenizer, exam.batch)
        result = examine(examinee, asked, exam.max_tokens, exam.stop)
        if mesh.rank == 0:
            print(f"{'questions':<15}{result.n:,}")
            for name, share in result.shares.items():
                print(f"{name:<15}{share:.4f}")
    return EXIT_DONE


def _print_perplexity(
    checkpoint: Path, data: Path, seq_length: int | None, batches: int | None, tokenizer: Path | None
) -> None:
    from megascratch.evals import evaluate as run
    from megascratch.log import make_console

    result = run(checkpoint, data, seq_length=seq_length, batches=batches, tokenizer=tokenizer, console=make_console())
    print(f"tokens      {result.n_tokens:,}")
    print(f"nats/token  {result.nats_per_token:.6f}")
    print(f"perplexity  {result.perplexity:.4f}")
    if result.bits_per_byte is not None:
        print(f"bits/byte   {result.bits_per_byte:.6f}")
