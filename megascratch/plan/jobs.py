"""Jobs for clusters: a recipe as a Slurm script, a Kubernetes manifest or a SkyPilot task, and where its ranks will be.

All three start one torchrun a node, whose processes meet through c10d on the first node. All three keep to the same
contract with the run: asked to end, they make the file `stop` in the run directory, the trainer saves after the step
that it is in and ends within `checkpoint.deadline_s`; started again, it goes on from its newest good checkpoint.

By hand, 16 ranks on 2 nodes of 8, tp 4 × pp 2 × dp 2: rank order is (pp, dp, cp, tp), tp fastest, so

    node  ranks  pp  dp   cp  tp
    0     0–7    0   0–1  0   0–3      the first stage, both replicas of it
    1     8–15   1   0–1  0   0–3
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megascratch.config import Config
from megascratch.dist.mesh import AXES, MeshSpec
from megascratch.errors import ConfigError, Problem

_RENDEZVOUS_PORT = 29400
_TO_LEAVE_S = 60  # beyond the deadline, for processes to end and nodes to be told


@dataclass(frozen=True)
class Job:
    """A run on a cluster.

    Attributes:
        name: of the job.
        recipe: its path, from the folder that the job runs in.
        overrides: of the recipe's keys.
        config: what both amount to.
        n_nodes: machines.
        gpus_per_node: ranks on each.
        max_restarts: how often all ranks are started again after one has failed.
    """

    name: str
    recipe: str
    overrides: Sequence[str]
    config: Config
    n_nodes: int
    gpus_per_node: int
    max_restarts: int

    @classmethod
    def of(
        cls, name: str, recipe: str, overrides: Sequence[str], config: Config, gpus_per_node: int, max_restarts: int
    ) -> "Job":
        """Return the job of a resolved recipe.

        Raises: ConfigError: if its ranks do not fill nodes.
        """
        n_ranks = MeshSpec.of(config.parallel).world_size
        if n_ranks % gpus_per_node:
            problem = Problem(
                f"--gpus-per-node = {gpus_per_node}",
                f"must divide the layout's {n_ranks} ranks",
                "set parallel.dp, or give the number of GPUs that the job is to use on a node",
            )
            raise ConfigError(problem, recipe)
        return cls(name, recipe, overrides, config, n_ranks // gpus_per_node, gpus_per_node, max_restarts)

    @property
    def preflight(self) -> str:
        """What a node's ranks do before they train."""
        return f"preflight --dir {shlex.quote(self.config.log.dir)}"

    @property
    def deadline_s(self) -> int:
        """How long before the end of the job the run is asked to stop."""
        return self.config.checkpoint.deadline_s + _TO_LEAVE_S

    def torchrun(self, endpoint: str, run_id: str, *more: str, verb: str = "") -> str:
        """Return the command that starts a node's ranks; endpoint and id are the shell's to fill in.

        Args:
            endpoint: where they meet.
            run_id: of this attempt.
            more: options.
            verb: what they are to do; to train when left out.
        """
        overrides = "".join(f" {shlex.quote(override)}" for override in self.overrides)
        verb = verb or f"pretrain {shlex.quote(self.recipe)}{overrides}"
        words = [
            "torchrun",
            f"--nnodes={self.n_nodes}",
            f"--nproc-per-node={self.gpus_per_node}",
            "--max-restarts=0 --rdzv-backend=c10d",
            f'--rdzv-endpoint="{endpoint}:{_RENDEZVOUS_PORT}"',
            f'--rdzv-id="{run_id}"',
            *more,
            f"-m megascratch {verb}",
        ]
        return " ".join(words)


def world_table(config: Config, gpus_per_node: int) -> str:
    """Return which ranks and coordinates each node has."""
    mesh = MeshSpec.of(config.parallel)
    sizes = " × ".join(f"{axis} {mesh.sizes[axis]}" for axis in reversed(AXES))
    rows: list[tuple[str, ...]] = [("node", "ranks", *AXES)]
    for node in range(mesh.world_size // gpus_per_node):
        ranks = range(node * gpus_per_node, (node + 1) * gpus_per_node)
        coords = [mesh.coords(rank) for rank in ranks]
        rows.append((f"{node}", _span([*ranks]), *(_span(sorted({c[axis] for c in coords})) for axis in AXES)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows]
    n_nodes = mesh.world_size // gpus_per_node
    heading = f"{mesh.world_size} ranks on {n_nodes} node{'s' if n_nodes > 1 else ''} of {gpus_per_node}: {sizes}"
    return "\n".join([heading, *lines])


def _span(numbers: Sequence[int]) -> str:
    consecutive = list(numbers) == list(range(numbers[0], numbers[-1] + 1))
    if len(numbers) == 1:
        return f"{numbers[0]}"
    return f"{numbers[0]}–{numbers[-1]}" if consecutive else ",".join(map(str, numbers))


def slurm_script(job: Job, time_limit: str) -> str:
    """Return a script for sbatch. Slurm sends USR1 to the script before the time limit; a saved run is requeued."""
    run = shlex.quote(job.config.log.dir)
    run_id = "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
    command = job.torchrun("${nodes[0]}", f"{run_id}.$attempt")
    check = job.torchrun("${nodes[0]}", f"{run_id}.preflight", verb=job.preflight)
    return f"""#!/usr/bin/env bash
#SBATCH --job-name={job.name}
#SBATCH --nodes={job.n_nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={job.gpus_per_node}
#SBATCH --exclusive
#SBATCH --time={time_limit}
#SBATCH --signal=B:USR1@{job.deadline_s}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={job.name}-%j.log
set -euo pipefail

run={run}
source .venv/bin/activate
mkdir -p "$run"
rm -f "$run/stop"
trap 'touch "$run/stop"' USR1 TERM  # the trainer saves after the step that it is in, and ends
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")

# A sick node is told before it costs a start: versions, ports, disk, arithmetic, rates between all pairs.
srun --kill-on-bad-exit=1 {check}

code=1
for ((attempt = 0; attempt <= {job.max_restarts}; attempt++)); do
    srun --kill-on-bad-exit=1 {command} &
    training=$!
    code=0
    while kill -0 "$training" 2>/dev/null; do  # a signal ends `wait` before the training has ended
        code=0
        wait "$training" || code=$?
    done
    if [[ $code -eq 0 || -e $run/stop ]]; then break; fi
    echo "$(date): a rank has failed: attempt $attempt of {job.max_restarts}"
done

# torchrun makes 1 of a rank's 75, so files tell: asked to stop, and a checkpoint was completed since.
if [[ -e $run/stop && $run/checkpoints/latest -nt $run/stop ]]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 75
fi
exit "$code"
"""


def kubernetes_manifest(job: Job, image: str, claim: str) -> list[dict[str, Any]]:
    """Return an Indexed Job of one pod a node, and the headless Service by which they meet.

    Args:
        job: to run.
        image: with megascratch in it.
        claim: a PersistentVolumeClaim that all nodes can write, mounted as the working folder.
    """
    run = shlex.quote(job.config.log.dir)
    endpoint = f"{job.name}-0.{job.name}"
    node = "--node-rank=$JOB_COMPLETION_INDEX"
    grace_s = job.deadline_s
    stop = f"touch {run}/stop; while pgrep -f 'megascratch pretrain' >/dev/null; do sleep 1; done"
    stale_s = max(3600, 3 * job.config.train.timeout_s)
    alive = f"test ! -e {run}/metrics.jsonl || test $(($(date +%s) - $(stat -c %Y {run}/metrics.jsonl))) -lt {stale_s}"
    script = (
        f"mkdir -p {run}; rm -f {run}/stop\n"
        f"{job.torchrun(endpoint, job.name + '-preflight', node, verb=job.preflight)}\n"
        f"exec {job.torchrun(endpoint, job.name, node)}\n"
    )
    labels = {"app": job.name}
    container = {
        "name": "trainer",
        "image": image,
        "workingDir": "/work",
        "command": ["bash", "-euc", script],
        "resources": {"limits": {"nvidia.com/gpu": job.gpus_per_node}},
        "ports": [{"containerPort": _RENDEZVOUS_PORT}],
        "volumeMounts": [{"name": "work", "mountPath": "/work"}, {"name": "shm", "mountPath": "/dev/shm"}],
        "lifecycle": {"preStop": {"exec": {"command": ["bash", "-c", stop]}}},
        "livenessProbe": {
            "exec": {"command": ["bash", "-c", alive]},
            "initialDelaySeconds": 1800,
            "periodSeconds": 60,
            "failureThreshold": 3,
        },
    }
    pod = {
        "subdomain": job.name,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": grace_s,
        "containers": [container],
        "volumes": [
            {"name": "work", "persistentVolumeClaim": {"claimName": claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }
    spec = {
        "completionMode": "Indexed",
        "completions": job.n_nodes,
        "parallelism": job.n_nodes,
        "backoffLimit": job.max_restarts * job.n_nodes,  # every node's pod fails when one rank does
        "template": {"metadata": {"labels": labels}, "spec": pod},
    }
    meta = {"name": job.name, "labels": labels}
    service = {"clusterIP": "None", "selector": labels, "publishNotReadyAddresses": True}
    return [
        {"apiVersion": "v1", "kind": "Service", "metadata": meta, "spec": service},
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": meta, "spec": spec},
    ]


def skypilot_task(job: Job, accelerator: str) -> dict[str, Any]:
    """Return a task for `sky jobs launch`, which starts it again elsewhere when its machines are taken away."""
    node = "--node-rank=$SKYPILOT_NODE_RANK"
    command = job.torchrun("$head", "$SKYPILOT_TASK_ID", node)
    check = job.torchrun("$head", "$SKYPILOT_TASK_ID.preflight", node, verb=job.preflight)
    run = (
        'head=$(echo "$SKYPILOT_NODE_IPS" | head -n1)\n'
        f"trap 'touch {shlex.quote(job.config.log.dir)}/stop' TERM\n"
        f"{check}\n"
        f"{command} &\n"
        "training=$!\n"
        "code=0\n"
        'while kill -0 "$training" 2>/dev/null; do code=0; wait "$training" || code=$?; done\n'
        'exit "$code"\n'
    )
    return {
        "name": job.name,
        "num_nodes": job.n_nodes,
        "workdir": ".",
        "resources": {
            "accelerators": f"{accelerator}:{job.gpus_per_node}",
            "job_recovery": {"strategy": "EAGER_NEXT_REGION", "max_restarts_on_errors": job.max_restarts},
        },
        "setup": "make setup\n",
        "run": "source .venv/bin/activate\n" + run,
    }


def yaml_text(documents: Sequence[dict[str, Any]]) -> str:
    """Return documents as YAML, scripts as they are written."""
    return "---\n".join("\n".join(_lines(document, 0)) + "\n" for document in documents)


def _lines(value: Any, depth: int) -> list[str]:
    """Return a table's or list's lines. Scalars are JSON, which YAML reads; only scripts stand as blocks."""
    pad, lines = "  " * depth, []
    items = [(f"{key}:", item) for key, item in value.items()] if isinstance(value, dict) else [("-", v) for v in value]
    for lead, item in items:
        if isinstance(item, str) and "\n" in item:
            lines += [f"{pad}{lead} |", *(f"{pad}  {line}" for line in item.rstrip("\n").split("\n"))]
        elif isinstance(item, (dict, list)) and item:
            lines += [f"{pad}{lead}", *_lines(item, depth + 1)]
        else:
            lines.append(f"{pad}{lead} {json.dumps(item, ensure_ascii=False)}")
    return lines
