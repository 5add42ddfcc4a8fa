"""Training: adapter and initial state learn; mission files come out."""

import logging
import math
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
from torch.utils.data import DataLoader

from rwkv_speech.data import librispeech
from rwkv_speech.data.bad_samples import BadSamples
from rwkv_speech.data.batches import AccumulationLoader, Batch, SpeechDataset, loader
from rwkv_speech.data.buckets import bucketed_loader, padding_waste
from rwkv_speech.data.durations import read_durations
from rwkv_speech.data.rendering import Rendered
from rwkv_speech.data.sample import Row
from rwkv_speech.engine.callbacks import FillFrames, NonFiniteLosses, ReportBadSamples
from rwkv_speech.engine.machine import fit_to_machine
from rwkv_speech.engine.metrics import Bar, Metrics
from rwkv_speech.engine.mission_files import MissionFiles
from rwkv_speech.engine.module import TrainingModule
from rwkv_speech.engine.overview import show_run
from rwkv_speech.engine.runs import StopRequest, find_run
from rwkv_speech.engine.trainer import fit, make_trainer
from rwkv_speech.engine.validation import Validation
from rwkv_speech.errors import UserError
from rwkv_speech.model import SpeechRWKV
from rwkv_speech.ops.common import check_missions, check_model_file, load_model, load_splits, named_mission
from rwkv_speech.options import Options, TrainingOptions
from rwkv_speech.speech.audio import SAMPLE_RATE
from rwkv_speech.speech.augmentation import NOISE_SNR_DB, SPEEDS, SpecAugment, WaveformAugmentation
from rwkv_speech.speech.frame_cache import FrameCache
from rwkv_speech.trained import newest_mission_file

log = logging.getLogger("rwkv_speech")


def train(options: Options) -> int:
    """Trains adapter and initial state; writes mission files into the project."""
    check_model_file(options.model)
    machine = fit_to_machine(options.machine)
    run = find_run(options)
    training, data = options.training, options.data
    bad_samples = BadSamples(data.on_bad_audio, options.project / "bad_audio.jsonl")
    rows = load_splits(data, data.train_split, librispeech.TRAIN_SPLIT.split("+"), join=True)["all"]
    validation_rows = load_splits(data, data.valid_split, (), join=True)["all"] if data.valid_split else []
    pl.seed_everything(training.random_seed, workers=True, verbose=False)
    # On several GPUs Lightning moves the model to each process's own.
    device = "cpu" if machine.accelerator == "gpu" else machine.first_device
    cache = FrameCache(data.cache_features, storage=data.cache_dtype) if data.cache_features else None
    model = load_model(options.model, options.model.adapter, device, machine, cache, mission=named_mission(rows))
    check_missions(rows + validation_rows, model)
    model.language_model.checkpointing = bool(training.grad_cp)
    if model.mission.chooses:
        found = model.mission.labels(rows)
        model.labels = options.model.labels or found
        if unknown := [label for label in found if label not in model.labels]:
            raise UserError(
                f"the data has the label {unknown[0]!r}, which is not among --labels {','.join(model.labels)}"
            )
    leading = model.mission.leading_of(validation_rows)
    mission_files = MissionFiles(
        options.project,
        run,
        model.describe(language_model=Path(options.model.load_model).name),
        epoch_save=training.epoch_save,
        save_steps=training.save_steps,
        leading=leading if validation_rows else None,
        average=training.average,
    )
    metrics = Metrics(options.project, run.id, leading)
    callbacks = [ReportBadSamples(bad_samples), metrics, Bar(metrics), mission_files]
    if cache:
        callbacks.insert(
            0, FillFrames(cache, [row for row in rows if (row.text or "").strip()] + validation_rows, bad_samples)
        )
    if validation_rows:
        validation = Validation(
            training, options.decoding, mission_files=mission_files, metrics=metrics, bad_samples=bad_samples
        )
        callbacks.append(validation)
    stop = StopRequest()
    trainer = make_trainer(options, machine, run, callbacks, stop)
    if validation_rows:
        validation.batches = loader(
            _dataset(model, validation_rows, cache),
            batch_size=options.eval_bsz,
            shuffle=False,
            num_workers=data.num_workers,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
    seconds = read_durations(rows, options.project / "durations.json", first=trainer.is_global_zero)
    if trainer.is_global_zero:
        show_run(model, options, machine, utterances=len(rows), seconds=seconds.sum())
    batches = AccumulationLoader(
        _training_batches(options, rows, seconds, model, cache, trainer),
        accumulate=training.accumulate_grad_batches,
        limit=training.epoch_steps,
    )
    module = TrainingModule(
        model,
        training,
        total_steps=math.ceil(len(batches) / training.accumulate_grad_batches) * training.epoch_count,
        stop=stop,
        on_nonfinite=NonFiniteLosses(training.on_nonfinite, options.project / "nonfinite.jsonl", model),
    )
    if not fit(trainer, module, batches, run):
        return 128 + signal.SIGTERM if trainer.is_global_zero else 0
    if trainer.is_global_zero:
        if training.average:
            mission_files.write_mean()
        run.finish()
    log.info("%s; the newest mission file is %s", bad_samples.report(), newest_mission_file(options.project))
    return 0


def _dataset(model: SpeechRWKV, rows: Sequence[Row], cache: FrameCache | None, **how: object) -> SpeechDataset:
    return SpeechDataset(
        rows,
        sample_of=model.mission.sample,
        renderer=model.renderer,
        extract=None if cache else model.speech_encoder.extract,
        cache=cache,
        **how,
    )


def _training_batches(
    options: Options,
    rows: list[Row],
    seconds: np.ndarray,
    model: SpeechRWKV,
    cache: FrameCache | None,
    trainer: pl.Trainer,
) -> DataLoader[Batch]:
    """The batches of this process, augmented as asked; the log says how much of them is padding."""
    training = options.training
    augmentation = WaveformAugmentation(
        training.random_seed,
        speeds=SPEEDS if training.speed_perturb else (1.0,),
        noise=_noise_files(training.noise_dir) if training.noise_dir else (),
        snr_db=training.noise_snr or NOISE_SNR_DB,
    )
    lengths = partial(augmentation.lengths, [row.id for row in rows], seconds)
    slowest = min(augmentation.speeds)
    dataset = _dataset(
        model,
        rows,
        cache,
        transform=augmentation if training.speed_perturb or training.noise_dir else None,
        filter=_too_long(training, slowest),
        spec_augment=SpecAugment(training.random_seed, model.speech_encoder.width) if training.spec_augment else None,
        needs_answer=True,
    )
    batches = bucketed_loader(
        dataset,
        lengths,
        longest=seconds / slowest,
        batch_size=training.micro_bsz,
        max_seconds=training.max_batch_s,
        accumulate=training.accumulate_grad_batches,
        seed=training.random_seed,
        num_workers=options.data.num_workers,
        rank=trainer.global_rank,
        world_size=trainer.world_size,
    )
    log.info(
        "training on %d utterances, %.1f h, in %d batches to a pass; %.1f %% of them is padding",
        len(rows),
        seconds.sum() / 3600,
        len(batches),
        100 * padding_waste(batches.batch_sampler, lengths(0)),
    )
    return batches


def _noise_files(folder: str) -> list[Path]:
    suffixes = librispeech.AUDIO_SUFFIXES
    found = sorted(path for path in Path(folder).expanduser().rglob("*") if path.suffix.lower() in suffixes)
    if not found:
        raise UserError(f"--noise_dir {folder}: no audio files there; expected recordings of noise")
    return found


def _too_long(training: TrainingOptions, slowest: float) -> Callable[[Rendered, Sequence[int]], str | None]:
    """Says of a rendered sample and its recordings' samples why it doesn't fit into the context, or into a batch.

    slowest: the lowest speed that augmentation draws.
    """
    limit = training.max_batch_s and training.max_batch_s * slowest

    def reason(rendered: Rendered, samples: Sequence[int]) -> str | None:
        if limit and sum(samples) > limit * SAMPLE_RATE:
            return f"{sum(samples) / SAMPLE_RATE:.1f} s, more than the {limit:g} s that --max_batch_s leaves"
        if len(rendered) > training.ctx_len:
            return f"{len(rendered)} positions, more than --ctx_len {training.ctx_len}"
        return None

    return reason
