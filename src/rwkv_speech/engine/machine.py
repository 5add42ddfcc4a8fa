"""What a run computes on: the settings, fitted to the machine where they leave it open, and its processes."""

import contextlib
import logging
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed
from lightning_fabric import Fabric

from rwkv_speech.errors import UserError
from rwkv_speech.options import MachineOptions

log = logging.getLogger("rwkv_speech")

T = TypeVar("T")

SEED_DEVICES = 4  # GPUs of the published recipe
SEED_STRATEGY = "deepspeed_stage_1"
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Machine:
    """Where and how to compute.

    accelerator, devices, num_nodes, strategy: as Lightning's Trainer takes them.
    precision: one of DTYPES.
    """

    accelerator: str
    devices: int | list[int]
    num_nodes: int
    strategy: str
    precision: str

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen parts and of computation; what is trained stays fp32."""
        return DTYPES[self.precision]

    @property
    def first_device(self) -> torch.device:
        """Where a single process computes."""
        if self.accelerator == "cpu":
            return torch.device("cpu")
        return torch.device("cuda", self.devices[0] if isinstance(self.devices, list) else 0)

    @property
    def per_node(self) -> int:
        return len(self.devices) if isinstance(self.devices, list) else self.devices


def fit_to_machine(options: MachineOptions) -> Machine:
    """Settles what the options leave open, in one line of the log; also sets torch's precision of fp32 products.

    Raises:
        UserError: the user asked for something that this machine doesn't have.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if options.accelerator == "gpu" and not gpus:
        raise UserError("--accelerator gpu, but torch sees no GPU here; leave it out to compute on the CPU")
    accelerator = "gpu" if gpus and options.accelerator != "cpu" else "cpu"
    devices: Any = options.devices or (min(SEED_DEVICES, gpus) if accelerator == "gpu" else 1)
    wanted = max(devices) + 1 if isinstance(devices, list) else devices
    if accelerator == "gpu" and wanted > gpus:
        raise UserError(f"--devices {options.devices}, but torch sees {gpus} GPU{'s' * (gpus > 1)} here")
    if accelerator == "cpu" and isinstance(devices, list):
        raise UserError(f"--devices {options.devices} names GPUs, but this run computes on the CPU: give a number")
    processes = (len(devices) if isinstance(devices, list) else devices) * options.num_nodes
    several_gpus = accelerator == "gpu" and processes > 1
    precision = options.precision or ("bf16" if accelerator == "gpu" else "fp32")
    strategy = options.strategy or (_several(precision) if several_gpus else "auto")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"  # of convolutions; torch's default is True
    name = torch.cuda.get_device_name() if accelerator == "gpu" else platform.machine()
    log.info("computing on %d x %s (%s), %s, strategy %s", processes, accelerator.upper(), name, precision, strategy)
    return Machine(accelerator, devices, options.num_nodes, strategy, precision)


def _several(precision: str) -> str:
    """The strategy of several GPUs. DeepSpeed would keep trained weights in fp16, and scales no gradients else."""
    return "ddp" if precision == "fp16" else SEED_STRATEGY


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


_SAID_WHY = 2  # exit status of a process that ended with a line for the user
_GRACE = 3.0  # seconds from there, at most, to its end


def make_fabric(machine: Machine) -> Fabric:
    """The processes of this run, not yet launched; `device` is already where this one computes."""
    for name in ("lightning_fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return Fabric(
        accelerator=machine.accelerator,
        devices=machine.devices,
        num_nodes=machine.num_nodes,
        strategy="auto" if machine.per_node * machine.num_nodes == 1 else "ddp",
    )


@contextlib.contextmanager
def launched(fabric: Fabric) -> Iterator[None]:
    """The block runs in all processes: the first one, where it gets here, starts the others.

    Those run the program from its beginning, so that what is wrong before the block is reported by one process only.
    Where something goes wrong in the block, none is left waiting for the one that met it, which alone reports it.
    """
    fabric.launch()
    try:
        yield
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except BaseException as error:
        others: list[subprocess.Popen] = getattr(fabric.strategy.launcher, "procs", [])
        reported = not isinstance(error, UserError | KeyboardInterrupt) and _one_said_why(others)
        for process in others:
            process.kill()
        if reported:  # and what went wrong here is only that it can't be reached
            raise SystemExit(_SAID_WHY) from None
        raise


def gather(mine: T) -> list[T]:
    """What each process has, in the order of their ranks; all processes call it together."""
    if not torch.distributed.is_initialized():
        return [mine]
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    return everyone


def _one_said_why(processes: list[subprocess.Popen]) -> bool:
    end = time.monotonic() + _GRACE
    while processes and time.monotonic() < end:
        if any(process.poll() == _SAID_WHY for process in processes):
            return True
        time.sleep(0.05)
    return False
