"""`megascratch generate`: complete a prompt."""

from pathlib import Path
from typing import Annotated

import typer


def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, or a directory with `latest`.")],
    prompt: Annotated[str, typer.Option(help="Text to complete.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Choose among the k likeliest tokens; 0: among all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Choose within this share of the probability.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same text.")] = 0,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks.")] = 1,
    tokenizer: Annotated[Path | None, typer.Option(help="The checkpoint's own when left out.")] = None,
) -> None:
    """Print the prompt and what the model makes of it, as it comes."""
    from megascratch.infer import generate as stream

    pieces = stream(
        checkpoint,
        prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        tp=tp,
        tokenizer=tokenizer,
    )
    for number, piece in enumerate(pieces):
        # A wrong option shows in the first piece: nothing is printed before.
        print(piece if number else prompt + piece, end="", flush=True)
    print()
