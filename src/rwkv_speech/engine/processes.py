"""Several processes that evaluate together: started together, and ended together."""

import contextlib
import logging
import subprocess
import time
from collections.abc import Iterator

import torch.distributed
from lightning_fabric import Fabric

from rwkv_speech.engine.machine import Machine
from rwkv_speech.errors import UserError

_SAID_WHY = 2  # exit status of a process that ended with a line for the user
_GRACE = 3.0  # seconds from there, at most, to its end


def make_fabric(machine: Machine) -> Fabric:
    """The processes of this run, not yet launched; `device` already tells where this one computes."""
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

    Those run the program from its beginning, so that what is wrong before the block is told by one process only. Where
    something goes wrong in the block, none is left waiting for the one that met it, and that one alone tells.
    """
    fabric.launch()
    try:
        yield
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except BaseException as error:
        others: list[subprocess.Popen] = getattr(fabric.strategy.launcher, "procs", [])
        told = not isinstance(error, UserError | KeyboardInterrupt) and _one_said_why(others)
        for process in others:
            process.kill()
        if told:  # and what went wrong here is only that it can't be reached
            raise SystemExit(_SAID_WHY) from None
        raise


def _one_said_why(processes: list[subprocess.Popen]) -> bool:
    end = time.monotonic() + _GRACE
    while processes and time.monotonic() < end:
        if any(process.poll() == _SAID_WHY for process in processes):
            return True
        time.sleep(0.05)
    return False
