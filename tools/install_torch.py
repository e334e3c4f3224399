"""Choose and install torch: the one that is there if it fits, the CUDA build beside an NVIDIA GPU, else the CPU build.

    .venv/bin/python tools/install_torch.py

A plain `pip install torch` on a machine without a GPU brings gigabytes of CUDA libraries that nothing there can use.
So the CPU build is asked for by its own version, `2.13.0+cpu`: first where pip already looks (a mirror, a folder of
wheels), then on PyTorch's own index, which has such builds. Each attempt gives up fast and says what it tries.
"""

import importlib.metadata
import re
import shutil
import subprocess
import sys

VERSION = "2.13.0"
OLDEST, TOO_NEW = (2, 11), (2, 14)  # torch>=2.11,<2.14, as pyproject.toml has it
CPU_INDEX = "https://download.pytorch.org/whl/cpu"

ATTEMPTS_WITH_GPU = (("the CUDA build", [f"torch=={VERSION}"]),)
ATTEMPTS_WITHOUT_GPU = (
    ("the CPU build, from where pip is set up to look", [f"torch=={VERSION}+cpu"]),
    (f"the CPU build, from {CPU_INDEX}", [f"torch=={VERSION}+cpu", "--index-url", CPU_INDEX]),
    ("whatever build pip finds", [f"torch=={VERSION}"]),
)


def installed_version() -> str | None:
    """Return the version of the torch of this Python, without the seconds that importing it takes."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def fits(version: str) -> bool:
    """Whether megascratch runs on this version of torch: 2.11.0+cu130 does, 2.10.1 and 2.14.0 do not."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return match is not None and OLDEST <= (int(match[1]), int(match[2])) < TOO_NEW


def has_nvidia_gpu() -> bool:
    """Whether the driver's own tool is there and sees a GPU."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def install(requirement: list[str]) -> str | None:
    """Install with pip, asking an index that does not answer once more and no longer.

    Returns: None, or why it did not work, in pip's words.
    """
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    finished = subprocess.run(
        [*pip, "--retries", "1", "--timeout", "20", *requirement], stderr=subprocess.PIPE, text=True
    )
    if finished.returncode == 0:
        return None
    errors = [line for line in finished.stderr.splitlines() if line.startswith("ERROR:")]
    return errors[-1] if errors else finished.stderr.strip()


def main() -> int:
    """Make sure that this Python has a torch that fits; return the exit code."""
    version = installed_version()
    if version is not None and fits(version):
        print(f"torch {version} is installed and fits")
        return 0
    gpu = has_nvidia_gpu()
    print("an NVIDIA GPU is here" if gpu else "no NVIDIA GPU is here")
    for what, requirement in ATTEMPTS_WITH_GPU if gpu else ATTEMPTS_WITHOUT_GPU:
        print(f"torch {VERSION}: trying {what}", flush=True)
        failure = install(requirement)
        if failure is None:
            importlib.invalidate_caches()
            print(f"torch {installed_version()} is installed")
            return 0
        print(f"  that did not work: {failure}")
    print(f"torch {VERSION} could not be installed; is this machine online?", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
