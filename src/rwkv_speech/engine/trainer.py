"""Lightning's Trainer, set up for one run."""

import importlib.util
import logging
import signal
import warnings
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.plugins.environments import SLURMEnvironment
from pytorch_lightning.callbacks import Callback, ProgressBar
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.strategies import StrategyRegistry
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher

from rwkv_speech.data.loading import AccumulationLoader, reading
from rwkv_speech.engine.deepspeed import STAGES, ZeRO
from rwkv_speech.engine.machine import Machine
from rwkv_speech.engine.runs import Interrupted, ResumePoints, Run, StopRequest, WholeFiles
from rwkv_speech.errors import UserError
from rwkv_speech.files import writing
from rwkv_speech.options import Options

log = logging.getLogger("rwkv_speech")


def make_trainer(
    options: Options, machine: Machine, run: Run, callbacks: list[Callback], stop: StopRequest, data: dict[str, Any]
) -> pl.Trainer:
    """A Trainer that saves its resume point in the run's folder, every `save_steps` and at each epoch's end.

    data: see `ResumePoints`.

    Raises:
        UserError: fp16 training without a GPU, a strategy that isn't there, or a logger that isn't installed.
    """
    _quiet()
    if machine.precision == "fp16" and machine.accelerator == "cpu":
        raise UserError("--precision fp16 trains on GPUs only, its small gradients need scaling: use bf16 or fp32")
    if machine.precision == "fp16" and machine.strategy in STAGES:
        raise UserError(f"--precision fp16 does not go with --strategy {machine.strategy}: use bf16, or ddp")
    plugins: list[Any] = [] if machine.strategy in STAGES else [WholeFiles()]
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # Lightning's own saves in the middle of a step
    return pl.Trainer(
        accelerator=machine.accelerator,
        devices=machine.devices,
        num_nodes=machine.num_nodes,
        strategy=_strategy(machine.strategy),
        # The model sets the types of weights and activations; fp16 also needs its gradients scaled.
        precision="16-mixed" if machine.precision == "fp16" else None,
        max_epochs=options.training.epoch_count,
        accumulate_grad_batches=options.training.accumulate_grad_batches,
        gradient_clip_val=options.training.grad_clip or None,
        callbacks=[*callbacks, ResumePoints(run, save_steps=options.training.save_steps, stop=stop, data=data)],
        plugins=plugins,
        default_root_dir=options.project,
        logger=_loggers(options, run),
        log_every_n_steps=1,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
        enable_model_summary=False,
    )


def fit(trainer: pl.Trainer, module: pl.LightningModule, batches: AccumulationLoader, run: Run) -> bool:
    """Trains to the end, or until asked to stop: then it logs how to go on, and gives False.

    Raises:
        UserError: the disk is full, a process that reads was killed, or what callbacks and the model raise.
    """
    try:
        with writing(run.folder), reading():
            trainer.fit(module, batches, ckpt_path=run.resume_point, weights_only=True)
    except Interrupted as interrupted:
        log.info("%s", interrupted)
        return False
    except BaseException as error:
        if isinstance(launcher := trainer.strategy.launcher, _SubprocessScriptLauncher):
            launcher.kill(signal.SIGKILL)  # the other processes would wait for this one
        if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None  # of which Lightning made an exit with status 1
        raise
    return True


def _quiet() -> None:
    """Silences what Lightning says of things that are as they are meant to be."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in (
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*exists and is not empty.*",
        ".*module\\(s\\) in eval mode.*",  # the frozen parts
        ".*does not have many workers.*",
        ".*smaller than the logging interval.*",
    ):
        warnings.filterwarnings("ignore", message)


def _strategy(name: str) -> Any:
    names = [n for n in ("auto", *StrategyRegistry.available_strategies()) if not n.startswith("deepspeed")]
    if name not in (*names, *STAGES):
        raise UserError(f"no --strategy {name}; there are {', '.join((*names, *STAGES))}")
    return ZeRO(name) if name in STAGES else name


def _loggers(options: Options, run: Run) -> list[Logger]:
    loggers: list[Logger] = [TensorBoardLogger(options.project, name="tensorboard", version=f"run-{run.number}")]
    if project := options.training.wandb:
        if importlib.util.find_spec("wandb") is None:
            raise UserError("--wandb needs the package wandb: pip install wandb")
        # A run that goes on stays one run there too, by its id.
        loggers.append(
            WandbLogger(project=project, save_dir=options.project, config=run.config, id=run.id, resume="allow")
        )
    return loggers
