"""Builds the C++ and CUDA sources of `cuda/` at first use and keeps the result.

The build goes to torch's extension cache, TORCH_EXTENSIONS_DIR or a folder of the user's, under a name made of
everything that the result depends on: the sources, the flags, torch, and the processor that `-march=native` compiles
for (a home folder may be shared by different machines). A library that is not as it was built is built again.
"""

import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

log = logging.getLogger("rwkv_speech")

# Of an installation they lie in the package, of a checkout beside src/.
SOURCES = Path(__file__).parents[1] / "cuda"
if not SOURCES.is_dir():
    SOURCES = Path(__file__).parents[3] / "cuda"


class BuildError(RuntimeError):
    """The extension cannot be built here; the message says what is missing."""


@functools.cache
def load_cpu() -> None:
    """Makes `torch.ops.rwkv_speech_cpu` available, building it if need be.

    Raises:
        BuildError: no compiler, or the build failed.
    """
    flags = ["-O3", "-march=native"] + (["-fopenmp"] if platform.system() == "Linux" else [])
    # -fopenmp is a compiler flag only: at link time it would bring a second OpenMP runtime beside torch's own.
    _load(
        "cpu",
        ["wkv6_cpu.cpp", "wkv7_cpu.cpp", "linear_cpu.cpp", "step_cpu.cpp", "binding_cpu.cpp"],
        flags,
        variant=_processor(),
    )


@functools.cache
def load_cuda() -> None:
    """Makes `torch.ops.rwkv_speech_cuda` available, building it for the GPUs present if need be.

    Raises:
        BuildError: no nvcc, or the build failed.
    """
    architectures = sorted({torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})
    _load("cuda", ["wkv_cuda.cpp", "wkv6.cu", "wkv7.cu"], ["-O3"], variant=str(architectures))


def _load(kind: str, sources: list[str], flags: list[str], *, variant: str) -> None:
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns where there is no GPU
    from torch.utils import cpp_extension

    if not SOURCES.is_dir():
        raise BuildError(f"its sources are not in {SOURCES}")
    digest = hashlib.sha256(repr((torch.__version__, platform.python_version(), flags, variant)).encode())
    for path in sorted(SOURCES.iterdir()):
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    name = f"rwkv_speech_{kind}_{digest.hexdigest()[:12]}"
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()).expanduser().resolve()
    folder = root / name
    library, done = folder / f"{name}.so", folder / "done"
    if not _is_whole(library, done):
        _check_tools(kind)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # The kernel drops this lock with the process, unlike torch's, which a killed build leaves behind.
            lock = open(folder / "build.lock", "w")  # noqa: SIM115
        except OSError as error:
            raise BuildError(
                f"{folder}: {error.strerror}; name a folder that can be written to by TORCH_EXTENSIONS_DIR"
            ) from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_whole(library, done):
                log.info("building the WKV operator (%s) in %s; this happens once", kind, folder)
                try:
                    done.unlink(missing_ok=True)
                    for left in folder.iterdir():  # ninja would go by the times of what is there
                        if left.name != "build.lock":
                            left.unlink()
                    cpp_extension.load(
                        name,
                        [str(SOURCES / source) for source in sources],
                        extra_cflags=flags,
                        extra_cuda_cflags=["-O3"] if kind == "cuda" else None,
                        build_directory=str(folder),
                        is_python_module=False,
                    )
                    done.write_text(_checksum(library))
                except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                    raise BuildError(_first_error(str(error))) from error
                return
    torch.ops.load_library(str(library))


def _is_whole(library: Path, done: Path) -> bool:
    """Whether a library is as it was built; to load it half would end the process."""
    try:
        return done.read_text() == _checksum(library)
    except (OSError, ValueError):
        return False


def _checksum(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def _check_tools(kind: str) -> None:
    from torch.utils import cpp_extension

    try:
        import ninja

        # The program of the package, also where the virtual environment is not activated.
        if ninja.BIN_DIR not in os.environ.get("PATH", "").split(os.pathsep):
            os.environ["PATH"] = ninja.BIN_DIR + os.pathsep + os.environ.get("PATH", "")
    except ImportError:
        pass
    if not cpp_extension.is_ninja_available():
        raise BuildError("ninja is missing (pip install ninja)")
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler.split()[0]) is None:
        raise BuildError(f"there is no C++ compiler ({compiler})")
    if kind == "cuda" and cpp_extension.CUDA_HOME is None:
        raise BuildError("there is no CUDA toolkit (nvcc)")


def _first_error(output: str) -> str:
    lines = [line for line in output.splitlines() if "error" in line.lower()]
    return (lines[1:] or lines or [output])[0].strip()


def _processor() -> str:
    """What distinguishes this processor for `-march=native`."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return next((line for line in cpuinfo if line.startswith(("flags", "Features"))), platform.machine())
