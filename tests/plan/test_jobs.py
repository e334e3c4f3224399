"""Jobs for clusters: the Slurm script run with stand-ins, manifests against the rules of their schemas, the layout."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import exit_code
from tiny_run import losses, pretrain_on_ranks, run_config, write_corpus
from two_nodes import two_nodes

from megascratch.config import config_from_dict, to_toml
from megascratch.dist.testing import RankPool
from megascratch.plan.jobs import world_table

RECIPE = """
[model]
preset = "tiny"
[parallel]
tp = 2
pp = 2
dp = 4
[train]
global_batch = 8
[checkpoint]
deadline_s = 120
[log]
dir = "runs/small"
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of 16 ranks, in the folder that commands run in."""
    monkeypatch.chdir(tmp_path)
    Path("small.toml").write_text(RECIPE)
    return Path("small.toml")


def written(*arguments: object) -> str:
    assert exit_code("launch", *arguments, "-o", "job") == 0
    return Path("job").read_text()


def test_dry_run_prints_where_each_rank_is(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("launch", recipe, "--dry-run") == 0
    assert capsys.readouterr().out.splitlines() == [
        "16 ranks on 2 nodes of 8: tp 2 × cp 1 × dp 4 × pp 2",
        "node  ranks  pp  dp   cp  tp",
        "0     0–7    0   0–3  0   0–1",
        "1     8–15   1   0–3  0   0–1",
    ]


def test_the_layout_follows_from_the_nodes(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.write_text(RECIPE.replace("dp = 4\n", ""))
    assert exit_code("launch", recipe, "--nodes", 1, "--dry-run") == 0
    assert capsys.readouterr().out.startswith("8 ranks on 1 node of 8: tp 2 × cp 1 × dp 2 × pp 2\n")


def test_coordinates_that_are_not_consecutive_are_listed() -> None:
    config = config_from_dict({"model": {"preset": "tiny"}, "parallel": {"tp": 2, "pp": 2, "dp": 1}})
    assert world_table(config, 1).splitlines()[2:4] == ["0     0      0   0   0   0", "1     1      0   0   0   1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], r"--slurm, --kubernetes, --skypilot +exactly one must be given"),
        (["--slurm", "--skypilot"], r"exactly one must be given"),
        (["--slurm", "--name", "A_b"], r"--name = A_b +must be small letters, digits and -"),
        (["--kubernetes"], r"--image +must be given with --kubernetes"),
        (["--slurm", "--gpus-per-node", 5], r"--gpus-per-node = 5 +must divide the layout's 16 ranks"),
    ],
)
def test_refused(recipe: Path, options: list[Any], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert exit_code("launch", recipe, *options) == 2
    assert re.search(message, capfd.readouterr().err)


# Slurm: the script itself, with stand-ins for what the cluster brings.

SRUN = 'shift\nexec "$@"\n'  # drops its own option
SCONTROL = 'echo "scontrol $*" >> calls\nif [[ $1 == show ]]; then printf "node7\\nnode8\\n"; fi\n'
PREFLIGHT = 'echo "torchrun $*" >> calls\nif [[ "$*" == *preflight* ]]; then exit "${PREFLIGHT:-0}"; fi\n'
STOPPED = f"""{PREFLIGHT}
while [[ ! -e runs/small/stop ]]; do sleep 0.05; done
mkdir -p runs/small/checkpoints
sleep 0.05
echo step_00000007 > runs/small/checkpoints/latest
exit 1
"""
FAILS_TWICE = f"{PREFLIGHT}[[ $(grep -c pretrain calls) -ge 3 ]]\n"
FAILS = f"{PREFLIGHT}exit 1\n"


def job(
    folder: Path, torchrun: str, interrupt: bool = False, srun: str = SRUN, scontrol: str = SCONTROL, **variables: str
) -> tuple[int, list[str]]:
    """Run the script; return its exit code and the calls of the stand-ins."""
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/activate").touch()
    tools = folder / "tools"
    tools.mkdir()
    for name, body in {"srun": srun, "scontrol": scontrol, "torchrun": torchrun}.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (tools / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "42", "SLURM_JOB_NODELIST": "node[7-8]", "PATH": f"{tools}:{os.environ['PATH']}"}
    process = subprocess.Popen(["bash", "job"], cwd=folder, env={**os.environ, **slurm, **variables})
    calls = folder / "calls"
    if interrupt:
        deadline = time.monotonic() + 20
        while not (calls.exists() and "pretrain" in calls.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)  # to the script alone, as --signal=B: does
    return process.wait(timeout=100), calls.read_text().splitlines()


def test_slurm_script_starts_ranks_after_preflight(recipe: Path, tmp_path: Path) -> None:
    text = written(recipe, "--slurm", "train.steps=10")
    assert "#SBATCH --nodes=2\n" in text
    assert "#SBATCH --signal=B:USR1@180\n" in text, "deadline_s, and a minute to leave"
    code, calls = job(tmp_path, PREFLIGHT)
    assert code == 0
    meeting = "--nnodes=2 --nproc-per-node=8 --max-restarts=0 --rdzv-backend=c10d --rdzv-endpoint=node7:29400"
    assert calls == [
        "scontrol show hostnames node[7-8]",
        f"torchrun {meeting} --rdzv-id=42.0.preflight -m megascratch preflight --dir runs/small",
        f"torchrun {meeting} --rdzv-id=42.0.0 -m megascratch pretrain small.toml train.steps=10",
    ]


def test_slurm_script_is_content_with_shellcheck(recipe: Path) -> None:
    written(recipe, "--slurm")
    assert subprocess.run(["bash", "-n", "job"]).returncode == 0
    if shutil.which("shellcheck") is not None:
        assert subprocess.run(["shellcheck", "--exclude=SC1091", "job"]).returncode == 0


def test_slurm_requeues_what_was_saved(recipe: Path, tmp_path: Path) -> None:
    written(recipe, "--slurm")
    code, calls = job(tmp_path, STOPPED, interrupt=True)
    assert (code, calls[-1]) == (75, "scontrol requeue 42")


def test_slurm_starts_ranks_again_after_a_failure(recipe: Path, tmp_path: Path) -> None:
    written(recipe, "--slurm", "--max-restarts", 3)
    code, calls = job(tmp_path, FAILS_TWICE)
    assert code == 0
    assert [call.split("--rdzv-id=")[1].split()[0] for call in calls[2:]] == ["42.0.0", "42.0.1", "42.0.2"]


def test_slurm_gives_up_in_the_end(recipe: Path, tmp_path: Path) -> None:
    written(recipe, "--slurm", "--max-restarts", 1)
    code, calls = job(tmp_path, FAILS)
    assert code == 1
    assert sum("pretrain" in call for call in calls) == 2
    assert not any("requeue" in call for call in calls)


def test_slurm_does_not_train_on_a_sick_node(recipe: Path, tmp_path: Path) -> None:
    written(recipe, "--slurm")
    code, calls = job(tmp_path, PREFLIGHT, PREFLIGHT="1")
    assert code == 1
    assert not any("pretrain" in call for call in calls)


def test_slurm_script_trains_on_two_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: RankPool, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two machines made of namespaces, torchrun on each, and the losses of a run on one machine."""
    monkeypatch.chdir(tmp_path)
    corpus = write_corpus(tmp_path)
    straight, config = (run_config(corpus, tmp_path / name, parallel={"dp": 2}) for name in ("one", "two"))
    Path("two.toml").write_text(to_toml(config))
    written("two.toml", "--slurm", "--gpus-per-node", 1)
    with two_nodes(tmp_path) as nodes:
        on_both = [f'{shlex.join(nodes.on(node))} "$@" &' for node in range(2)]
        srun = "\n".join(["shift", *on_both, "wait %1 && wait %2\n"])
        torchrun = f'{PREFLIGHT}exec {sys.executable} -m torch.distributed.run "$@"\n'
        names = 'if [[ $1 == show ]]; then printf "node-a\\nnode-b\\n"; fi\n'
        code, calls = job(tmp_path, torchrun, srun=srun, scontrol=names, OMP_NUM_THREADS="1")
    assert code == 0, capfd.readouterr().err
    assert sum("pretrain two.toml" in call for call in calls) == 2
    pool.run(2, pretrain_on_ranks, straight)
    assert losses(config) == losses(straight)


# Manifests: the rules of their schemas that bear on them.

# Keys and types of a SkyPilot task, as far as we use them: sky/utils/schemas.py of skypilot-org/skypilot at 00052dfe,
# get_task_schema and _get_single_resources_schema, both of which allow no other key.
TASK = {"name": str, "num_nodes": int, "workdir": str, "resources": dict, "setup": str, "run": str}
RESOURCES = {"accelerators": str, "job_recovery": dict}
JOB_RECOVERY = {"strategy": str, "max_restarts_on_errors": int}
STRATEGIES = ("EAGER_NEXT_REGION", "FAILOVER")  # sky/jobs/recovery_strategy.py

NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")


def test_kubernetes_manifest_is_one_the_api_takes(recipe: Path) -> None:
    text = written(recipe, "--kubernetes", "--image", "team/megascratch:1", "--claim", "shared")
    service, manifest = yaml.safe_load_all(text)
    assert (service["apiVersion"], service["kind"], service["spec"]["clusterIP"]) == ("v1", "Service", "None")
    assert (manifest["apiVersion"], manifest["kind"]) == ("batch/v1", "Job")
    spec = manifest["spec"]
    pod = spec["template"]["spec"]
    container = pod["containers"][0]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == 2
    assert isinstance(spec["backoffLimit"], int)
    assert pod["restartPolicy"] in ("Never", "OnFailure"), "of a Job's pods"
    assert pod["subdomain"] == service["metadata"]["name"], "pods find each other by the headless service"
    assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
    assert {m["name"] for m in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert all(len(volume) == 2 for volume in pod["volumes"]), "a name and one source each"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert pod["terminationGracePeriodSeconds"] == 180
    for name in (manifest["metadata"]["name"], container["name"], *(v["name"] for v in pod["volumes"])):
        assert NAME.fullmatch(name)
    handlers = (container["lifecycle"]["preStop"], container["livenessProbe"])
    assert all(isinstance(word, str) for handler in handlers for word in handler["exec"]["command"])
    assert '--rdzv-endpoint="small-0.small:29400"' in container["command"][2]
    for script in (container["command"][2], *(handler["exec"]["command"][2] for handler in handlers)):
        assert subprocess.run(["bash", "-nc", script]).returncode == 0


@pytest.mark.parametrize("version", ["1.28", "1.37"])
def test_kubernetes_manifest_keeps_to_the_published_schema(recipe: Path, version: str) -> None:
    kubernetes = pytest.importorskip("kubernetes_validate")
    for document in yaml.safe_load_all(written(recipe, "--kubernetes", "--image", "i", "--claim", "c")):
        kubernetes.validate(document, version, strict=True)
        with pytest.raises(kubernetes.ValidationError):
            kubernetes.validate(document | {"spec": document["spec"] | {"unheard_of": 1}}, version, strict=True)


def test_kubernetes_probe_tells_a_run_that_stands_still(recipe: Path) -> None:
    text = written(recipe, "--kubernetes", "--image", "i", "--claim", "c")
    probe = list(yaml.safe_load_all(text))[1]["spec"]["template"]["spec"]["containers"][0]["livenessProbe"]["exec"]
    assert subprocess.run(probe["command"]).returncode == 0, "before the first step"
    metrics = Path("runs/small/metrics.jsonl")
    metrics.parent.mkdir(parents=True)
    metrics.touch()
    assert subprocess.run(probe["command"]).returncode == 0
    os.utime(metrics, (0, 0))
    assert subprocess.run(probe["command"]).returncode == 1


def test_skypilot_task_keeps_to_the_schema(recipe: Path) -> None:
    task = yaml.safe_load(written(recipe, "--skypilot", "--accelerator", "H200", "--max-restarts", 5))
    resources = task["resources"]
    recovery = resources["job_recovery"]
    for table, schema in ((task, TASK), (resources, RESOURCES), (recovery, JOB_RECOVERY)):
        assert {key: type(value) for key, value in table.items()} == schema
    assert task["num_nodes"] == 2
    assert resources["accelerators"] == "H200:8"
    assert recovery == {"strategy": "EAGER_NEXT_REGION", "max_restarts_on_errors": 5}
    assert recovery["strategy"] in STRATEGIES
    assert subprocess.run(["bash", "-nc", task["run"]]).returncode == 0
