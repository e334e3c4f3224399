"""`megascratch eval`: how well a checkpoint predicts a dataset."""

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a directory with `latest`.")],
    data: Annotated[Path, typer.Option(help="A dataset's prefix, without .bin and .idx.")],
) -> None:
    """Print perplexity, nats a token and bits a byte on a dataset."""
    from megascratch.evals import evaluate as run

    result = run(checkpoint, data)
    print(f"tokens      {result.n_tokens:,}")
    print(f"nats/token  {result.nats_per_token:.6f}")
    print(f"perplexity  {result.perplexity:.4f}")
    if result.bits_per_byte is not None:
        print(f"bits/byte   {result.bits_per_byte:.6f}")
