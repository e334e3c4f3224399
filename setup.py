"""Build the compiled parts with ninja: two stable-ABI operator libraries, their host twin, and the pybind11 modules.

    libmegascratch_cpu.so        csrc/cpu, once an instruction-set level, by g++ alone; always
    libmegascratch_cuda.so       csrc/cuda for every GPU architecture that this nvcc knows; whenever nvcc is found
    libmegascratch_cuda_host.so  the same .cu files compiled by g++ and run on fibers, as a test backend; always
    tokenizer/{_bpe_v2,_bpe_v3,_sentencepiece}, data/{_jsonl,_sample_index}   csrc/host, bound with pybind11; always

Metadata stands in pyproject.toml. torch's own `CUDAExtension` refuses to build CUDA beside a CPU torch, and it links
the unstable C++ ABI; hence this small `build_ext`. Only what changed is rebuilt: ninja knows headers and flags.
"""

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"
# The oldest torch whose stable ABI the libraries use: the same file loads on this one and every later one.
TORCH_TARGET = "0x020b000000000000"
# compute_80 also leaves PTX behind, which architectures that are not listed compile when the library is first used.
GPU_CODES = {"compute_80": "[sm_80,compute_80]", "compute_90a": "sm_90a", "compute_100": "sm_100"}


def cpu_levels() -> dict[str, list[str]]:
    """Instruction-set levels of this machine's architecture, name → g++ flags; the library picks one when it loads."""
    if platform.machine() in ("x86_64", "AMD64"):
        return {level: [f"-march=x86-64-{level}"] for level in ("v2", "v3", "v4")}
    return {"baseline": []}


def package_dir(name: str) -> Path:
    """The directory of an installed package, found without importing it: importing torch takes seconds."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            f"megascratch: {name} is missing: install it first, then megascratch with --no-build-isolation"
        )
    return Path(spec.submodule_search_locations[0])


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def escape(path: Path) -> str:
    """A path as ninja wants it in a build line."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class NinjaFile:
    """The text of a build.ninja, one edge at a time; ninja itself tracks headers, flags and what is out of date."""

    def __init__(self, build_dir: Path) -> None:
        self.build_dir = build_dir
        self.lines = [
            "rule compile",
            "  command = $tool -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $tool -shared -o $out $in $libraries",
        ]

    def compile(self, source: Path, command: list[str], variant: str) -> str:
        """Add an object file; returns its name. The variant tells objects of one source apart."""
        name = f"{variant}/{source.stem}_{source.suffix[1:]}.o"
        self.lines += [f"build {name}: compile {escape(source)}", f"  tool = {shlex.join(command)}"]
        return name

    def link(self, name: str, objects: list[str], command: list[str], libraries: list[str]) -> None:
        self.lines += [f"build {name}: link {' '.join(objects)}", f"  tool = {shlex.join(command)}"]
        self.lines += [f"  libraries = {shlex.join(libraries)}"]

    def run(self) -> None:
        self.build_dir.mkdir(parents=True, exist_ok=True)
        (self.build_dir / "build.ninja").write_text("\n".join(self.lines) + "\n")
        if subprocess.run([sys.executable, "-m", "ninja", "-C", str(self.build_dir)]).returncode != 0:
            raise SystemExit("megascratch: the compiled parts did not build; the compiler's message is above")


class BuildNative(build_ext):
    """`build_ext` for everything under csrc/."""

    def run(self) -> None:
        gxx = shutil.which("g++")
        if gxx is None:
            raise SystemExit(
                "megascratch: g++ is missing: install it (Debian, Ubuntu: apt-get install g++), then repeat"
            )
        ninja = NinjaFile(ROOT / "build/native")  # build_temp would be a new one for each editable install
        self.add_operators(ninja, gxx)
        self.add_pybind11_modules(ninja, gxx)
        ninja.run()
        for name, target in self.targets().items():
            if target.exists() and target.stat().st_mtime == (ninja.build_dir / name).stat().st_mtime:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            # A running process may have the old file mapped: a new inode leaves it whole, writing into it would not.
            fresh = target.with_suffix(".new")
            shutil.copy2(ninja.build_dir / name, fresh)
            fresh.replace(target)

    def add_operators(self, ninja: NinjaFile, gxx: str) -> None:
        torch = package_dir("torch")
        cxx = [gxx, "-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", f"-I{CSRC / 'include'}"]
        stable = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-isystem", str(torch / "include")]
        # libtorch brings whichever of libtorch_cpu and libtorch_cuda this torch has; it is found by the time we load.
        libraries = [f"-L{torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-Wl,--as-needed"]

        levels = cpu_levels()
        objects = [ninja.compile(CSRC / "cpu/registration.cpp", [*cxx, *stable], "cpu")]
        for level, flags in levels.items():
            command = [*cxx, "-fopenmp-simd", "-fno-math-errno", f"-DMEGASCRATCH_LEVEL={level}", *flags]
            objects += [ninja.compile(source, command, f"cpu_{level}") for source in kernels("cpu", "cpp")]
        ninja.link("libmegascratch_cpu.so", objects, [gxx], libraries)

        host = [*cxx, "-DMEGASCRATCH_CUDA_HOST", "-Wno-unknown-pragmas"]
        objects = [ninja.compile(CSRC / "cuda/registration.cpp", [*host, *stable], "cuda_host")]
        objects += [ninja.compile(source, [*host, "-x", "c++"], "cuda_host") for source in kernels("cuda", "cu")]
        ninja.link("libmegascratch_cuda_host.so", objects, [gxx], libraries)

        nvcc = find_nvcc()
        if nvcc is None:
            print("megascratch: no nvcc, so no CUDA library: on a GPU the PyTorch reference runs")
            return
        codes = " ".join(arch.replace("compute", "sm") for arch in gpu_codes(nvcc))
        described = f'-DMEGASCRATCH_GPU_CODES="{codes}"'
        objects = [ninja.compile(CSRC / "cuda/registration.cpp", [*cxx, *stable, described], "cuda")]
        objects += [ninja.compile(source, nvcc_command(nvcc, gxx), "cuda") for source in kernels("cuda", "cu")]
        # The static runtime: the library then loads on a machine with neither a GPU nor a CUDA torch.
        link = [nvcc, "-ccbin", gxx, "-cudart", "static"]
        ninja.link(
            "libmegascratch_cuda.so", objects, link, [option.replace("-Wl,", "-Xlinker=") for option in libraries]
        )

    def add_pybind11_modules(self, ninja: NinjaFile, gxx: str) -> None:
        include = ["-isystem", str(package_dir("pybind11") / "include"), "-isystem", sysconfig.get_path("include")]
        command = [gxx, "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-pthread", *include]
        for module, (source, flags) in pybind11_modules().items():
            name = Path(module).name.partition(".")[0]
            named = [*command, *flags, f"-DMEGASCRATCH_MODULE={name}"]
            ninja.link(module, [ninja.compile(source, named, f"host/{name}")], [gxx, "-pthread"], [])

    def targets(self) -> dict[str, Path]:
        """Where each built file goes: into the source tree for an editable install, else into the wheel's tree."""
        base = ROOT if self.inplace else Path(self.build_lib).absolute()
        libraries = ["libmegascratch_cpu.so", "libmegascratch_cuda_host.so"]
        libraries += ["libmegascratch_cuda.so"] if find_nvcc() else []
        paths = {name: base / "megascratch/ops" / name for name in libraries}
        return paths | {module: base / "megascratch" / module for module in pybind11_modules()}

    def get_outputs(self) -> list[str]:
        return [] if self.inplace else [str(path) for path in self.targets().values()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in sorted(CSRC.rglob("*.*"))]


def kernels(folder: str, suffix: str) -> list[Path]:
    """The kernel sources of a folder: every file but the one that knows torch."""
    return [path for path in sorted((CSRC / folder).glob(f"*.{suffix}")) if path.stem != "registration"]


def gpu_codes(nvcc: str) -> dict[str, str]:
    """Those of GPU_CODES that this nvcc can compile for: Blackwell came with CUDA 12.8."""
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    return {arch: code for arch, code in GPU_CODES.items() if arch.replace("compute", "sm").rstrip("a") in known}


def nvcc_command(nvcc: str, gxx: str) -> list[str]:
    generate = [f"-gencode=arch={arch},code={code}" for arch, code in gpu_codes(nvcc).items()]
    # Spills are a fault of ours that depends on nvcc's version: CI refuses them, a user's installation goes on.
    strict = ["-Werror=all-warnings"] if os.environ.get("MEGASCRATCH_STRICT") else []
    strict += ["-Xptxas=-warn-spills,-warn-lmem-usage"]
    host = ["-ccbin", gxx, "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
    return [nvcc, "-std=c++20", "-O3", "--threads=0", *generate, *strict, *host, f"-I{CSRC / 'include'}"]


def pybind11_modules() -> dict[str, tuple[Path, list[str]]]:
    """The source and the flags of each module. The tokenizer's core has one a level: its masks want AVX2 and BMI2."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    host = CSRC / "host"
    modules = {f"tokenizer/_bpe_{level}": (host / "bpe.cpp", flags) for level, flags in bpe_levels().items()}
    modules["tokenizer/_sentencepiece"] = host / "sentencepiece.cpp", []
    modules |= {f"data/_{name}": (host / f"{name}.cpp", []) for name in ("jsonl", "sample_index")}
    return {f"{module}{suffix}": built_from for module, built_from in modules.items()}


def bpe_levels() -> dict[str, list[str]]:
    levels = {level: flags for level, flags in cpu_levels().items() if level != "v4"}
    if "v3" in levels:
        levels["v3"] = [*levels["v3"], "-maes"]  # no level has it, every processor of this one does; it hashes pieces
    return levels


# The extension is named only so that setuptools knows the wheel to be of one platform.
setup(ext_modules=[Extension("megascratch._native", sources=[])], cmdclass={"build_ext": BuildNative})
