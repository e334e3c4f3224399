"""`megascratch preflight`: is every node and every link as it should be?"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megascratch.errors import EXIT_DONE, EXIT_FAILED

if TYPE_CHECKING:
    from megascratch.dist.launch import Environment


@dataclass(frozen=True)
class Request:
    """What is measured, and what counts as slow."""

    folder: Path
    tolerance: float


def preflight(
    folder: Annotated[Path, typer.Option("--dir", help="Folder that the run will write to.")] = Path("runs"),
    ranks: Annotated[int | None, typer.Option(min=1, help="On this machine; one a GPU when left out.")] = None,
    tolerance: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Times the median: what is slower is named.")
    ] = 0.5,
) -> None:
    """Measure versions, ports, disk, arithmetic, memory and all links, and name what differs from the rest.

    Under torchrun or srun it measures every rank that was started. Ends with 1 where something is wrong.
    """
    import torch

    from megascratch.cli.ranks import run_ranks

    raise typer.Exit(run_ranks(run, Request(folder, tolerance), ranks or max(1, torch.cuda.device_count())))


def run(request: Request, environment: "Environment | None") -> int:
    """Run one rank; returns its exit code."""
    from contextlib import nullcontext

    from megascratch.dist.launch import Environment, process_group
    from megascratch.dist.mesh import Mesh, MeshSpec
    from megascratch.engine.preflight import preflight as measure

    env = environment or Environment(rank=0, world_size=1, local_rank=0, local_world_size=1)
    with process_group(env, 120.0) if env.world_size > 1 else nullcontext():
        mesh = Mesh.create(MeshSpec(dp=env.world_size), env.device)
        lines, wrong = measure(mesh, request.folder, request.tolerance)
    if env.rank == 0:
        print("\n".join([*lines, *(f"LOOK AT  {line}" for line in wrong)] if wrong else [*lines, "all is well"]))
    return EXIT_FAILED if wrong else EXIT_DONE
