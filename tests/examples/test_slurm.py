"""The Slurm script, with stand-ins for Slurm and torchrun: what it starts, and when it goes back into the queue."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples/slurm/pretrain.sbatch"
RUN = Path("runs/llama3-8b")

SRUN = 'shift\nexec "$@"\n'  # drops its own option
SCONTROL = 'echo "scontrol $*" >> calls\nif [[ $1 == show ]]; then printf "node7\\nnode8\\n"; fi\n'
# Trains until it is asked to stop, then saves; a rank's exit code 75 becomes torchrun's 1.
STOPPED = f"""echo "torchrun $*" >> calls
while [[ ! -e {RUN}/stop ]]; do sleep 0.05; done
sleep 0.1
mkdir -p {RUN}/checkpoints
echo step_00000007 > {RUN}/checkpoints/latest
exit 1
"""
FINISHED = 'echo "torchrun $*" >> calls\n'
FAILED = FINISHED + "exit 1\n"
FAILED_WHILE_STOPPING = STOPPED.replace("mkdir", "exit 1\nmkdir")


def prepare(folder: Path, torchrun: str) -> dict[str, str]:
    """Lay out a clone with stand-ins, and return the environment of a job in it."""
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/activate").touch()
    tools = folder / "tools"
    tools.mkdir()
    for name, body in {"srun": SRUN, "scontrol": SCONTROL, "torchrun": torchrun}.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (tools / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "42", "SLURM_NNODES": "8", "SLURM_JOB_NODELIST": "node[7-8]"}
    return {**os.environ, **slurm, "PATH": f"{tools}:{os.environ['PATH']}"}


def job(folder: Path, torchrun: str, *arguments: str, interrupt: bool = False) -> tuple[int, str]:
    """Run the script; return its exit code and the calls of the stand-ins."""
    environment = prepare(folder, torchrun)
    process = subprocess.Popen(["bash", SCRIPT, *arguments], cwd=folder, env=environment, start_new_session=True)
    if interrupt:
        deadline = time.monotonic() + 20
        while "torchrun" not in read(folder / "calls") and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)  # to the script alone, as --signal=B: does
    return process.wait(timeout=20), read(folder / "calls")


def read(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def test_script_parses() -> None:
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0


def test_shellcheck_is_content() -> None:
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    assert subprocess.run([shellcheck, "--exclude=SC1091", SCRIPT]).returncode == 0


def test_torchrun_gets_the_rendezvous_and_the_recipe(tmp_path: Path) -> None:
    code, calls = job(tmp_path, FINISHED, "train.steps=10")
    assert code == 0
    assert calls.splitlines() == [
        "scontrol show hostnames node[7-8]",
        "torchrun --nnodes=8 --nproc-per-node=8 --max-restarts=0 --rdzv-backend=c10d --rdzv-endpoint=node7:29400"
        " --rdzv-id=42.0 -m megascratch pretrain examples/slurm/pretrain.toml log.dir=runs/llama3-8b train.steps=10",
    ]


def test_signal_leads_to_a_checkpoint_and_back_into_the_queue(tmp_path: Path) -> None:
    code, calls = job(tmp_path, STOPPED, interrupt=True)
    assert code == 75
    assert calls.splitlines()[-1] == "scontrol requeue 42"


def test_stop_without_a_checkpoint_is_a_failure(tmp_path: Path) -> None:
    code, calls = job(tmp_path, FAILED_WHILE_STOPPING, interrupt=True)
    assert code == 1
    assert "requeue" not in calls


def test_failure_is_not_requeued_even_beside_an_older_stop_and_checkpoint(tmp_path: Path) -> None:
    (tmp_path / RUN / "checkpoints").mkdir(parents=True)
    (tmp_path / RUN / "stop").touch()
    (tmp_path / RUN / "checkpoints/latest").touch()
    code, calls = job(tmp_path, FAILED)
    assert code == 1
    assert "requeue" not in calls
