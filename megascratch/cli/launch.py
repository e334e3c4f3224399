"""`megascratch launch`: a recipe as a job for a cluster."""

import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from megascratch.cli.recipe import RecipeArguments, split_arguments
from megascratch.errors import ConfigError, Problem


class Cluster(StrEnum):
    """Who starts the job."""

    slurm = "slurm"
    kubernetes = "kubernetes"
    skypilot = "skypilot"


def launch(
    arguments: RecipeArguments = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Write a script for sbatch.")] = False,
    kubernetes: Annotated[bool, typer.Option("--kubernetes", help="Write a manifest for kubectl apply.")] = False,
    skypilot: Annotated[bool, typer.Option("--skypilot", help="Write a task for sky jobs launch.")] = False,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="Ranks on each node.")] = 8,
    nodes: Annotated[int | None, typer.Option(min=1, help="As many as the layout needs when left out.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the job; the recipe's when left out.")] = None,
    time_limit: Annotated[str, typer.Option("--time", help="Slurm's limit; the job is requeued at it.")] = "24:00:00",
    max_restarts: Annotated[int, typer.Option(min=0, help="After a rank has failed.")] = 3,
    image: Annotated[str | None, typer.Option(help="Kubernetes: an image with megascratch in it.")] = None,
    claim: Annotated[str | None, typer.Option(help="Kubernetes: the volume claim to work in.")] = None,
    accelerator: Annotated[str, typer.Option(help="SkyPilot's name of the GPU.")] = "H100",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write; stdout when left out.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print where each rank will be instead.")] = False,
) -> None:
    """Write a ready job: saved when it is asked to end, requeued at its time limit, resumed when it starts again."""
    from megascratch.config import load_config
    from megascratch.plan.jobs import Job, kubernetes_manifest, skypilot_task, slurm_script, world_table, yaml_text

    chosen = [which for which, asked in zip(Cluster, (slurm, kubernetes, skypilot)) if asked]
    recipe, overrides = split_arguments(arguments)
    problems = _problems(chosen, recipe, name, image, claim, dry_run)
    if problems:
        raise ConfigError(problems, "the command line")
    assert recipe is not None
    config = load_config(recipe, overrides, world_size=nodes * gpus_per_node if nodes else None)
    job = Job.of(name or recipe.stem.replace("_", "-"), str(recipe), overrides, config, gpus_per_node, max_restarts)
    if dry_run:
        print(world_table(config, gpus_per_node))
        return
    if chosen[0] is Cluster.slurm:
        text = slurm_script(job, time_limit)
    elif chosen[0] is Cluster.kubernetes:
        text = yaml_text(kubernetes_manifest(job, image or "", claim or ""))
    else:
        text = yaml_text([skypilot_task(job, accelerator)])
    if output is None:
        sys.stdout.write(text)
    else:
        output.write_text(text, encoding="utf-8")


def _problems(
    chosen: list[Cluster], recipe: Path | None, name: str | None, image: str | None, claim: str | None, dry_run: bool
) -> list[Problem]:
    """Return what is wrong with the options."""
    problems = []
    if recipe is None:
        problems.append(Problem("RECIPE", "must be given", "a TOML file that every node can read"))
    if len(chosen) > 1 or (not chosen and not dry_run):
        problems.append(Problem("--slurm, --kubernetes, --skypilot", "exactly one must be given", "or --dry-run"))
    if name is not None and not re.fullmatch(r"[a-z]([-a-z0-9]{0,48}[a-z0-9])?", name):
        problems.append(Problem(f"--name = {name}", "must be small letters, digits and -", "shorten it"))
    for option, value in (("--image", image), ("--claim", claim)):
        if chosen == [Cluster.kubernetes] and value is None and not dry_run:
            problems.append(Problem(option, "must be given with --kubernetes", "see --help"))
    return problems
