"""DeepSpeed through Lightning's strategy, made to fit frozen models, and to run on CPUs too.

- DeepSpeed sees trained weights only. To it the frozen ones are constants: it neither casts, partitions nor saves them.
- A checkpoint, a folder of several processes' files, is written under another name and renamed when it is whole.
- On CPUs the processes talk by gloo, so that everything here can be tested without a GPU.
"""

import os
import shutil
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.plugins.precision import DeepSpeedPrecision
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, ParallelStrategy
from torch import nn

from rwkv_speech.files import PARTIAL, replacing

# Name -> ZeRO stage, and whether the optimiser (and in stage 3 the parameters) live in the memory of the CPU.
STAGES = {
    "deepspeed_stage_1": (1, False),
    "deepspeed_stage_2": (2, False),
    "deepspeed_stage_2_offload": (2, True),
    "deepspeed_stage_3": (3, False),
    "deepspeed_stage_3_offload": (3, True),
}


class ZeRO(DeepSpeedStrategy):
    """One of `STAGES`, on GPUs or CPUs."""

    def __init__(self, name: str) -> None:
        stage, offload = STAGES[name]
        super().__init__(
            stage=stage,
            offload_optimizer=offload,
            offload_parameters=offload and stage == 3,
            precision_plugin=_Precision("32-true"),
        )
        self.config["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW, as everywhere, whatever its place

    def setup_environment(self) -> None:
        if isinstance(self.accelerator, CPUAccelerator):
            # An index, which Lightning's CPU devices lack, is DeepSpeed's name for a device.
            self.parallel_devices = [torch.device("cpu", i) for i in range(self.num_processes)]
            self.accelerator.setup_device(self.root_device)
            ParallelStrategy.setup_environment(self)
            DDPStrategy.setup_distributed(self)
        else:
            super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        for module in self.model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if not parameter.requires_grad:
                    delattr(module, name)
                    module.register_buffer(name, parameter.data, persistent=False)
        super().setup(trainer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str, storage_options: Any = None) -> None:
        filepath = self.broadcast(str(filepath))
        with replacing(filepath):
            if self.is_global_zero:
                shutil.rmtree(filepath + PARTIAL, ignore_errors=True)
            self.barrier()
            super().save_checkpoint(checkpoint, filepath + PARTIAL, storage_options)
            self.barrier()
            if self.is_global_zero:
                os.replace(filepath + PARTIAL, filepath)
            self.barrier()


class _Precision(DeepSpeedPrecision):
    """Leaves types alone: those of weights and activations are the model's own affair."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def convert_input(self, data: Any) -> Any:
        return data
