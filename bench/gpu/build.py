"""What comes first: the machine in one line, and the operator's extensions."""

import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version

import torch

from bench.gpu.common import Run
from rwkv_speech.lm import extension

NO_GPU = 3  # exit status
PACKAGES = ("triton", "transformers", "pytorch-lightning", "deepspeed", "fla-core", "jiwer", "soundfile")


def build(run: Run) -> None:
    """Builds for the CPU and for the card side by side; the others find the results in torch's cache."""
    gpu = torch.cuda.is_available()
    if not run.dry and not gpu:
        run.record("machine", ok=False, torch=torch.__version__, error="torch sees no GPU here; --dry needs none")
        sys.exit(NO_GPU)
    versions = {name: _version(name) for name in PACKAGES}
    card = "none, a dry run" if run.dry else torch.cuda.get_device_name()
    cuda = {"cuda": torch.version.cuda, "driver": _driver()} if gpu else {}
    run.record("machine", card=card, python=platform.python_version(), torch=torch.__version__, **cuda, **versions)
    start = time.perf_counter()
    for_cpu = subprocess.Popen([sys.executable, "-c", "from rwkv_speech.lm import extension; extension.load_cpu()"])
    if not run.dry:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "{}.{}".format(*torch.cuda.get_device_capability()))
        try:
            extension.load_cuda()
        except extension.BuildError as error:
            run.record("CUDA extension", ok=False, error=str(error), nvcc=shutil.which("nvcc") or "not on the PATH")
    for_cpu.wait()
    run.record("operator", backend=run.backend, seconds=round(time.perf_counter() - start, 1))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "not told"
