"""`megascratch eval`: how well a checkpoint predicts a dataset."""

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a directory with `latest`.")],
    data: Annotated[Path, typer.Option(help="A dataset's prefix, without .bin and .idx.")],
    seq_length: Annotated[int | None, typer.Option(help="Tokens a window; that of training when left out.")] = None,
    batches: Annotated[int | None, typer.Option(help="Micro-batches to read; all when left out.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="The checkpoint's own when left out.")] = None,
) -> None:
    """Print perplexity, nats a token and bits a byte on a dataset."""
    from megascratch.evals import evaluate as run
    from megascratch.log import make_console

    result = run(checkpoint, data, seq_length=seq_length, batches=batches, tokenizer=tokenizer, console=make_console())
    print(f"tokens      {result.n_tokens:,}")
    print(f"nats/token  {result.nats_per_token:.6f}")
    print(f"perplexity  {result.perplexity:.4f}")
    if result.bits_per_byte is not None:
        print(f"bits/byte   {result.bits_per_byte:.6f}")
