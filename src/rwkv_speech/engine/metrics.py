"""What training measures, step by step: to `metrics.csv`, the loggers, the picture and the progress bar."""

import contextlib
import csv
import io
import logging
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from pytorch_lightning.callbacks.progress.tqdm_progress import Tqdm

from rwkv_speech.data.batches import Batch
from rwkv_speech.engine.machine import peak_memory
from rwkv_speech.files import write_whole, writing
from rwkv_speech.progress import hours
from rwkv_speech.scoring import MetricKind

log = logging.getLogger("rwkv_speech")

COLUMNS = (
    "run",
    "step",
    "epoch",
    "loss",
    "ctc_loss",
    "lr",
    "state_lr",
    "audio_s_per_s",
    "utt_per_s",
    "valid_loss",
)
PICTURE_SECONDS = 30.0  # between two drawings
WARM_UP, MEASURED = 5, 20  # optimiser steps before the time per epoch is measured, and while it is


class MetricsFile:
    """A table of all runs of a project, a row for each measurement; a run that goes on drops what it will redo.

    rows: of this run.
    """

    def __init__(self, path: Path, run: str, columns: Sequence[str]) -> None:
        self.path, self.run, self.columns = path, run, list(columns)
        self.rows: list[dict[str, float]] = []

    def begin(self, step: int) -> None:
        """Goes on after the rows of this step."""
        before = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                reader = csv.DictReader(file)
                self.columns += [name for name in reader.fieldnames or () if name not in self.columns]
                for row in reader:
                    if None in row.values():
                        continue  # cut off in the middle of the row
                    ours = row["run"] == self.run
                    if not ours or int(row["step"]) <= step:
                        before.append(row)
                        if ours:
                            self.rows.append({name: float(row[name]) for name in self.columns[1:] if row.get(name)})
        content = io.StringIO()
        table = csv.DictWriter(content, self.columns, extrasaction="ignore", lineterminator="\n")
        table.writeheader()
        table.writerows(before)
        write_whole(self.path, content.getvalue().encode())

    def add(self, row: dict[str, float]) -> None:
        self.rows.append(row)
        with writing(self.path), self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow({"run": self.run} | row)


class Metrics(Callback):
    """Measures every 10 optimiser steps (in short epochs, every one), over those steps and all processes.

    folder: takes `metrics.csv` and `training.png`.
    run: its id.
    leading: the score that validation measures.
    """

    def __init__(self, folder: Path, run: str, leading: MetricKind) -> None:
        columns = (*COLUMNS, f"valid_{leading.name}")
        self.file, self.picture = MetricsFile(folder / "metrics.csv", run, columns), folder / "training.png"
        self.leading = leading
        self.latest: dict[str, float] = {}  # what was measured last
        self.drawn = -PICTURE_SECONDS
        self._reset()

    def _reset(self) -> None:
        self.loss_sum = self.tokens = self.ctc_sum = self.ctc_tokens = self.utterances = self.seconds = 0.0
        self.since = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.first_step = self.step = trainer.global_step
        self.every = 10 if trainer.num_training_batches >= 50 * trainer.accumulate_grad_batches else 1
        if trainer.is_global_zero:
            self.file.begin(self.step)
        self._reset()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self.rates = {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        stats = outputs["stats"]
        self.loss_sum += stats.loss_sum
        self.tokens += stats.tokens
        self.ctc_sum += stats.ctc_sum
        self.ctc_tokens += stats.ctc_tokens
        self.utterances += stats.utterances
        self.seconds += stats.seconds
        if trainer.global_step == self.step:  # in the middle of an optimiser step
            return
        self.step = trainer.global_step
        if self.step == self.first_step + WARM_UP:
            self.timed_since = time.perf_counter()
        elif self.step == self.first_step + WARM_UP + MEASURED:
            self._log_time(trainer, pl_module.device)
        if self.step % self.every == 0 or self.step == self.first_step + 1:
            elapsed = time.perf_counter() - self.since
            sums = {"loss": (self.loss_sum, self.tokens), "ctc_loss": (self.ctc_sum, self.ctc_tokens)}
            row = {name: total / tokens for name, (total, tokens) in sums.items() if tokens} | {
                "lr": self.rates["adapter"],
                "state_lr": self.rates["state"],
                "audio_s_per_s": self.seconds / elapsed,
                "utt_per_s": self.utterances / elapsed,
            }
            self._reset()
            self.record(trainer, row)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:  # the validation at the end of training is over, too
            self._draw()

    def record(self, trainer: pl.Trainer, row: dict[str, float]) -> None:
        """Writes a row of this step, wherever one looks for it."""
        if not trainer.is_global_zero:
            return
        self.latest = row
        for logger in trainer.loggers:
            logger.log_metrics(row | {"epoch": trainer.current_epoch}, step=trainer.global_step)
        rounded = {name: float(f"{value:.8g}") for name, value in row.items()}
        self.file.add({"step": trainer.global_step, "epoch": trainer.current_epoch} | rounded)
        if time.monotonic() - self.drawn > PICTURE_SECONDS:
            self._draw()

    def _draw(self) -> None:
        write_whole(self.picture, draw(self.file.rows, self.leading))
        self.drawn = time.monotonic()

    def _log_time(self, trainer: pl.Trainer, device: torch.device) -> None:
        step_time = (time.perf_counter() - self.timed_since) / MEASURED
        steps = trainer.num_training_batches / trainer.accumulate_grad_batches
        if trainer.is_global_zero:
            log.info(
                "measured over %d steps: %.3g s a step, %s an epoch; peak memory %.2f GiB",
                MEASURED, step_time, hours(step_time * steps), peak_memory(device) / 2**30,
            )  # fmt: skip


class _Shown(Callback):
    """What `Metrics` measured last, and the time left for the whole run."""

    def __init__(self, metrics: Metrics) -> None:
        super().__init__()
        self.metrics = metrics

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.begun, self.first_step = time.perf_counter(), trainer.global_step

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        shown = {name: f"{value:.3g}" for name, value in self.metrics.latest.items()}
        done = trainer.global_step - self.first_step
        if done and pl_module.total_steps:
            left = pl_module.total_steps - trainer.global_step
            shown["left"] = hours((time.perf_counter() - self.begun) / done * left)
        return shown


class Bar(_Shown, TQDMProgressBar):
    """In a terminal: one line, which changes."""

    def init_train_tqdm(self) -> Tqdm:
        with contextlib.redirect_stdout(sys.stderr):  # where a reader that goes away does not end the training
            return super().init_train_tqdm()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._train_progress_bar is not None:
            self._train_progress_bar.close()  # ends its line, before what went wrong is said


class Lines(_Shown):
    """In a log: a line for the first step and the last, and every so many seconds between."""

    def __init__(self, metrics: Metrics, every: float) -> None:
        super().__init__(metrics)
        self.every, self.said, self.said_step = every, math.inf, 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self.first_step + 1 or time.perf_counter() - self.said >= self.every:
            self._say(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._say(trainer, pl_module)

    def _say(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.global_step != self.said_step:
            facts = ", ".join(f"{name} {value}" for name, value in self.get_metrics(trainer, module).items())
            log.info("step %d of %s: %s", trainer.global_step, module.total_steps, facts)
        self.said, self.said_step = time.perf_counter(), trainer.global_step


def draw(rows: Sequence[dict[str, float]], leading: MetricKind) -> bytes:
    """A PNG of the rows of `metrics.csv`: each has a step, and whichever columns were measured there."""
    score = f"valid_{leading.name}"
    panels = (
        ("loss", "log", {"loss": "training", "valid_loss": "validation", "ctc_loss": "CTC alignment"}),
        ("learning rate", "linear", {"lr": "adapter", "state_lr": "initial state"}),
        (f"validation {leading.label}{', %' * leading.percent}", "linear", {score: None}),
        ("seconds of audio per second", "linear", {"audio_s_per_s": None}),
    )
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot: no window, no global state
    for axes, (title, scaling, curves) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for column, label in curves.items():
            points = [(row["step"], row[column]) for row in rows if column in row]
            if points:
                scale = 100 if column == score and leading.percent else 1
                marker = "o" if column.startswith("valid") or len(points) == 1 else None
                steps, values = zip(*points, strict=True)
                axes.plot(steps, [value * scale for value in values], marker=marker, ms=3, lw=1, label=label)
        if not axes.lines:
            axes.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axes.transAxes, color="gray")
        else:
            axes.set_yscale(scaling)
            if None not in curves.values():
                axes.legend()
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("optimiser step")
        axes.grid(alpha=0.3)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    return content.getvalue()
