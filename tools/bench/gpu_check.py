#!/usr/bin/env python3
"""Build, test and measure on a GPU, part by part, each in a process of its own with a limit of its own.

    tools/gpu_check.sh --out gpu_results.json

After every part the results so far are written, so that a part that hangs, or a machine that is taken away, costs that
part and not the others. gpu_results.json holds the commit, the device, and for each part its status ("ok", "failed",
"timed out", "no time left"), its seconds, the end of what it printed, and its own result:

    parts.ops     one row an operator, shape and dtype: milliseconds, share of the measured copy bandwidth
    parts.train…  one row a model and dtype: tokens/s, MFU in both conventions, where the time went, peak memory
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "tools/bench"
TAIL_CHARACTERS = 4000
# The operators' CUDA backend, and what else skips itself without a GPU; not the host run of the same kernels.
GPU_TESTS = ("tests/ops", "tests/nn/test_fp8.py", "tests/nn/test_transformer_engine.py", "tests/engine/test_graph.py")
GPU_TESTS += ("-k", "(cuda and not host) or a_gpu or their_kernels")


@dataclass(frozen=True)
class Part:
    """A command and the most seconds that it may take; one that measures writes JSON into the file after `--out`."""

    name: str
    group: str
    command: tuple[str, ...]
    limit_s: float
    measures: bool = False


def parts(python: str = sys.executable) -> list[Part]:
    """Return all parts, the cheapest to lose last. 8B with its optimizer is larger than 139 GiB: half of its layers."""
    train = [
        ("llama-1b", 16, "bf16", 2),
        ("llama-1b", 16, "fp8", 2),
        ("llama3-8b", 16, "bf16", 1),
        ("llama3-8b", 16, "fp8", 1),
    ]
    return [
        Part("build", "build", (python, "setup.py", "build_ext", "--inplace"), 150),
        Part("tests", "tests", (python, "-m", "pytest", "-q", *GPU_TESTS), 120),
        Part("ops", "ops", (python, str(BENCH / "gpu_ops.py")), 60, measures=True),
        *(
            Part(
                f"train {model} {dtype}",
                "train",
                (
                    python,
                    str(BENCH / "gpu_step.py"),
                    f"model.preset={model}",
                    f"model.n_layers={n_layers}",
                    f"train.dtype={dtype}",
                    f"train.micro_batch={micro_batch}",
                ),
                60,
                measures=True,
            )
            for model, n_layers, dtype, micro_batch in train
        ),
    ]


def run_part(part: Part, limit_s: float) -> dict[str, Any]:
    """Run one part and say what came of it. At its limit it is killed with all that it started."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        out, log = Path(folder) / "result.json", Path(folder) / "log"
        command = [*part.command, "--out", str(out)] if part.measures else list(part.command)
        with log.open("wb") as output:
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
            try:
                status = "ok" if process.wait(timeout=limit_s) == 0 else "failed"
            except subprocess.TimeoutExpired:
                status = "timed out"
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        found: dict[str, Any] = {
            "status": status,
            "seconds": round(time.monotonic() - started, 1),
            "exit_code": process.returncode,
            "output_tail": log.read_text(encoding="utf-8", errors="replace")[-TAIL_CHARACTERS:],
        }
        if part.measures and out.exists():  # a part that was stopped may have measured some rows
            found["result"] = json.loads(out.read_text(encoding="utf-8"))
        return found


def run_parts(chosen: Sequence[Part], budget_s: float, out: Path, about: dict[str, Any]) -> bool:
    """Run parts one after another within a budget, and write what is known after each; return whether all ran."""
    started = time.monotonic()
    results: dict[str, Any] = {**about, "parts": {}}
    for part in chosen:
        left = budget_s - (time.monotonic() - started)
        found = {"status": "no time left"} if left < 5 else run_part(part, min(part.limit_s, left))
        results["parts"][part.name] = found
        results["seconds"] = round(time.monotonic() - started, 1)
        write_atomically(out, results)
        print(f"{part.name:<24} {found['status']:<12} {found.get('seconds', 0):>6} s", flush=True)
    return all(found["status"] == "ok" for found in results["parts"].values())


def write_atomically(path: Path, results: dict[str, Any]) -> None:
    fresh = path.with_name(path.name + ".tmp")
    fresh.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    fresh.replace(path)


def why_not() -> str | None:
    """Return in one line why nothing can be measured here, or None."""
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU here"
    if not (shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")):
        return "nvcc is not installed"
    return None


def about_this_machine() -> dict[str, Any]:
    import torch

    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "commit": git.stdout.strip() or None,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    everything = parts()
    groups = list(dict.fromkeys(part.group for part in everything))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu_results.json"))
    parser.add_argument("--budget", type=float, default=520.0, help="seconds that all parts may take together")
    parser.add_argument("--parts", nargs="+", choices=groups, default=groups)
    args = parser.parse_args(arguments)
    reason = why_not()
    if reason is not None:
        print(f"gpu_check: nothing was measured: {reason}", file=sys.stderr)
        return 2
    chosen = [part for part in everything if part.group in args.parts]
    return 0 if run_parts(chosen, args.budget, args.out.resolve(), about_this_machine()) else 1


if __name__ == "__main__":
    sys.exit(main())
