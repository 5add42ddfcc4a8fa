"""DeepSpeed through Lightning's strategy, made to fit frozen models, and to run on CPUs too.

- DeepSpeed sees trained weights only. To it the frozen ones are constants: it neither casts, partitions nor saves them.
- A checkpoint, a folder of several processes' files, is written under another name and renamed when it is whole.
- On CPUs the processes talk by gloo, so that everything here can be tested without a GPU.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.plugins.precision import DeepSpeedPrecision
from pytorch_lightning.strategies import DDPStrategy, DeepSpeedStrategy, ParallelStrategy
from torch import Tensor, nn

from rwkv_speech.files import PARTIAL, writing

# Name -> ZeRO stage, and whether the optimiser (and in stage 3 the parameters) live in the CPU's memory.
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
        self.config["zero_force_ds_cpu_optimizer"] = False  # torch's AdamW wherever the optimiser is, as without ZeRO
        # What is trained is a hundredth of the model: each process keeps what it has gathered until the next step,
        # and may decode without the others.
        self.config["zero_optimization"]["stage3_param_persistence_threshold"] = 2**40

    def setup_environment(self) -> None:
        if not isinstance(self.accelerator, CPUAccelerator):
            super().setup_environment()
            return
        import deepspeed  # takes seconds, here and below: only who uses it waits for it

        # DeepSpeed calls a device by its index, which Lightning's CPU devices lack.
        self.parallel_devices = [torch.device("cpu", i) for i in range(self.num_processes)]
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, for inference only
        ParallelStrategy.setup_environment(self)
        DDPStrategy.setup_distributed(self)

    def setup(self, trainer: pl.Trainer) -> None:
        for module in self.model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if not parameter.requires_grad:
                    delattr(module, name)
                    module.register_buffer(name, parameter.data, persistent=False)
        super().setup(trainer)
        if self.zero_stage_3:
            import deepspeed

            model = self.lightning_module.model
            for tensor in model.trained_tensors().values():
                # Read by the language model, not by the layers that they belong to.
                if tensor.part != "adapter" and tensor.parameter.requires_grad:
                    deepspeed.zero.register_external_parameter(model.language_model, tensor.parameter)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str, storage_options: Any = None) -> None:
        path = Path(self.broadcast(str(filepath)))
        partial = path.with_name(path.name + PARTIAL)
        with writing(path):
            if self.is_global_zero:
                shutil.rmtree(partial, ignore_errors=True)
            self.barrier()
            super().save_checkpoint(checkpoint, str(partial), storage_options)
            self.barrier()
            if self.is_global_zero:
                shutil.rmtree(path, ignore_errors=True)
                os.replace(partial, path)
            self.barrier()


@contextmanager
def gathered(trainer: pl.Trainer, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within it, parameters are whole under every strategy. All processes must enter it together."""
    if isinstance(trainer.strategy, ZeRO) and trainer.strategy.zero_stage_3:
        import deepspeed

        with deepspeed.zero.GatheredParameters(parameters):
            yield
    else:
        yield


class _Precision(DeepSpeedPrecision):
    """Leaves types alone: the model sets those of weights and activations."""

    def backward(self, tensor: Tensor, model: pl.LightningModule, *args: Any, **kwargs: Any) -> None:
        # Lightning has divided by the micro-batches of a step already.
        super().backward(tensor, model, *args, scale_wrt_gas=False, **kwargs)

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module

    def convert_input(self, data: Any) -> Any:
        return data
