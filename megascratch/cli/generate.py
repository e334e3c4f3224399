"""`megascratch generate`: complete a prompt."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from megascratch.dist.launch import Environment


@dataclass(frozen=True)
class Request:
    """What to generate, and from which checkpoint."""

    checkpoint: Path
    prompt: str
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    tp: int
    tokenizer: Path | None


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
    from megascratch.cli.ranks import run_ranks

    request = Request(checkpoint, prompt, max_tokens, temperature, top_k, top_p, seed, tp, tokenizer)
    raise typer.Exit(run_ranks(print_completion, request, tp))


def print_completion(request: Request, env: "Environment | None") -> int:
    """Run one rank of a request; rank 0 prints. Returns: the exit code."""
    from contextlib import nullcontext
    from itertools import chain

    from megascratch.dist.launch import Environment, process_group, share_cores
    from megascratch.dist.mesh import Mesh, MeshSpec
    from megascratch.errors import EXIT_DONE
    from megascratch.infer import generate_text

    env = env or Environment(rank=0, world_size=1, local_rank=0, local_world_size=1)
    share_cores(env.local_world_size)
    with process_group(env) if env.world_size > 1 else nullcontext():
        mesh = Mesh.create(MeshSpec(tp=request.tp), env.device)
        pieces = generate_text(
            request.checkpoint,
            request.prompt,
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_k=request.top_k,
            top_p=request.top_p,
            seed=request.seed,
            mesh=mesh,
            tokenizer=request.tokenizer,
        )
        for piece in chain([request.prompt], pieces, ["\n"]):  # a wrong request has shown by now: nothing is printed
            if mesh.rank == 0:
                print(piece, end="", flush=True)
    return EXIT_DONE
