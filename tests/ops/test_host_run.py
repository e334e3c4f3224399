"""The host run of CUDA kernels: each gives the same bits in every schedule, and none does without its barriers.

Each barrier of csrc/cuda is removed in turn, in a small kernel of the test's own and in the kernels themselves.
"""

import ctypes
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SEEDS = range(12)
BARRIER = "__syncthreads();"


def compile_without(barrier: int | None, folder: Path) -> ctypes.CDLL:
    """Compile the test kernels against reduce.h with its n-th barrier removed, or whole."""
    gxx = shutil.which("g++")
    if gxx is None:
        pytest.skip("no g++")
    pieces = (ROOT / "csrc/cuda/reduce.h").read_text().split(BARRIER)
    assert len(pieces) == 3, "reduce.h has two barriers; has a new one a test here?"
    joints = [BARRIER, BARRIER]
    if barrier is not None:
        joints[barrier] = ""
    (folder / "reduce.h").write_text(pieces[0] + joints[0] + pieces[1] + joints[1] + pieces[2])
    library = folder / "reduce_rows.so"
    includes = [f"-I{folder}", f"-I{ROOT / 'csrc/cuda'}", f"-I{ROOT / 'csrc/include'}"]
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-x", "c++", "-Wno-unknown-pragmas"]
    subprocess.run(
        [gxx, *flags, *includes, str(Path(__file__).parent / "reduce_rows.cu"), "-o", str(library)], check=True
    )
    return ctypes.CDLL(str(library))


def right_schedules(library: ctypes.CDLL, threads: int) -> int:
    """Under how many of the schedules every thread gets its row's sum."""
    x = torch.randn(6, threads, dtype=torch.float64)
    expected = x.sum(dim=1, keepdim=True).expand_as(x)
    right = 0
    for seed in SEEDS:
        out = torch.empty_like(x)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, out)]
        library.run_sum_rows(*pointers, ctypes.c_int64(len(x)), ctypes.c_uint(threads), ctypes.c_uint64(seed))
        right += torch.allclose(out, expected)
    return right


def test_whole_and_without_each_barrier(tmp_path):
    found = {}
    for barrier in (None, 0, 1):
        folder = tmp_path / str(barrier)
        folder.mkdir()
        found[barrier] = right_schedules(compile_without(barrier, folder), threads=256)
    assert found[None] == len(SEEDS)
    # The first barrier stands before the reading, the second before the next row's writing.
    assert found[0] <= len(SEEDS) // 4
    assert found[1] <= len(SEEDS) // 4


def test_threads_that_part_end_the_run(tmp_path):
    library = compile_without(None, tmp_path)
    library.run_divergent.restype = ctypes.c_char_p
    assert b"others wait at a barrier" in library.run_divergent(False)
    assert b"only some lanes of a warp reach" in library.run_divergent(True)


def test_sizes_of_a_team(tmp_path):
    library = compile_without(None, tmp_path)
    for threads in (32, 64, 512, 1024):
        assert right_schedules(library, threads) == len(SEEDS)


SCHEDULES = Path(__file__).with_name("host_schedules.py")
HOST_LIBRARY = ROOT / "megascratch/ops/libmegascratch_cuda_host.so"
OBJECTS = ROOT / "build/native/cuda_host"
# Which kernels need a barrier: (file, number in it) → beginnings of the cases' names. The second barrier of a reduction
# keeps the next one of the same kind off its memory: only where a block makes two of them.
NEEDED = {
    ("reduce.h", 0): {
        "squared_norm",
        "scaled_softmax",
        "scaled_softmax_backward",
        "logit_statistics",
        "rms_norm",
        "add_rms_norm",
        "layer_norm",
        "rms_norm_backward",
        "layer_norm_backward",
    },
    ("reduce.h", 1): {"layer_norm", "layer_norm_backward"},
    ("norm.cu", 0): {"rms_norm_backward", "layer_norm_backward"},
    ("cast_transpose.cu", 0): {"cast_transpose"},
    # It stands before a block's next tile, of which there is none below 2³¹ blocks.
    ("cast_transpose.cu", 1): set(),
}


def distinct_results(library: Path, *dtypes: str) -> dict[str, int]:
    """In how many ways each case comes out of the schedules, by a library's kernels."""
    run = subprocess.run([sys.executable, SCHEDULES, library, *dtypes], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found: dict[str, int] = json.loads(run.stdout)
    return found


def test_every_kernel_gives_the_same_bits_in_every_schedule():
    if not HOST_LIBRARY.exists():
        pytest.skip(f"{HOST_LIBRARY.name} was not built")
    found = distinct_results(HOST_LIBRARY, "float32", "float64", "bfloat16", "float16")
    assert {case for case, count in found.items() if count != 1} == set()


def mutant(file: str, barrier: int, folder: Path) -> Path:
    """Build the host library with a barrier removed: only the sources that hold it are compiled again."""
    pieces = (ROOT / "csrc/cuda" / file).read_text().split(BARRIER)
    joints = [BARRIER] * (len(pieces) - 1)
    joints[barrier] = ""
    text = pieces[0] + "".join(joint + piece for joint, piece in zip(joints, pieces[1:], strict=True))
    (folder / file).write_text(text)
    objects = []
    for built in sorted(OBJECTS.glob("*.o")):
        source = ROOT / "csrc/cuda" / f"{built.stem.removesuffix('_cu')}.cu"
        affected = source.exists() and (source.name == file or f'"{file}"' in source.read_text())
        if affected:
            if source.name != file:
                shutil.copy(source, folder)  # a quoted include is looked for beside its source first
            command = ["g++", "-std=c++20", "-O0", "-fPIC", "-fvisibility=hidden", "-DMEGASCRATCH_CUDA_HOST"]
            command += ["-Wno-unknown-pragmas", f"-I{ROOT / 'csrc/include'}", f"-iquote{ROOT / 'csrc/cuda'}"]
            built = folder / built.name
            subprocess.run([*command, "-x", "c++", "-c", str(folder / source.name), "-o", str(built)], check=True)
        objects.append(str(built))
    library, torch_libraries = folder / "libmutant.so", Path(torch.__file__).parent / "lib"
    link = ["g++", "-shared", "-o", str(library), *objects, f"-L{torch_libraries}", "-ltorch", "-ltorch_cpu"]
    subprocess.run(link, check=True)
    return library


def test_the_table_knows_every_barrier():
    found = {(path.name, i) for path in (ROOT / "csrc/cuda").iterdir() for i in range(path.read_text().count(BARRIER))}
    assert found == set(NEEDED)


@pytest.mark.parametrize(("file", "barrier"), NEEDED, ids=lambda x: str(x))
def test_a_kernel_without_a_barrier_that_it_needs_is_caught(file, barrier, tmp_path):
    if shutil.which("g++") is None or not (OBJECTS / "registration_cpp.o").exists():
        pytest.skip("no g++, or the library was not built here")
    found = distinct_results(mutant(file, barrier, tmp_path), "float32")
    caught = {case.split(" ")[0].split(",")[0] for case, count in found.items() if count > 1}
    assert caught == NEEDED[file, barrier]
