"""Training: adapter and initial state learn; mission files come out."""

import logging
import math
import random
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from rwkv_speech.alignment import fits
from rwkv_speech.data import librispeech
from rwkv_speech.data.bad_samples import BadSamples
from rwkv_speech.data.batches import Batch, SpeechDataset, copy_id
from rwkv_speech.data.buckets import bucketed_loader, padding_waste
from rwkv_speech.data.durations import read_durations
from rwkv_speech.data.listing import audio_files
from rwkv_speech.data.loading import AccumulationLoader, loader
from rwkv_speech.data.mixing import Mix
from rwkv_speech.data.rendering import Rendered
from rwkv_speech.data.sample import Row, SampleError, fingerprint
from rwkv_speech.data.sources import split_weights
from rwkv_speech.engine.callbacks import FillFrames, NonFiniteLosses, ReportBadSamples
from rwkv_speech.engine.lock import project_lock
from rwkv_speech.engine.machine import Machine, fit_to_machine
from rwkv_speech.engine.metrics import Bar, Lines, Metrics
from rwkv_speech.engine.mission_files import MissionFiles
from rwkv_speech.engine.module import TrainingModule
from rwkv_speech.engine.overview import show_run, warn_of_warm_up
from rwkv_speech.engine.runs import StopRequest, find_run
from rwkv_speech.engine.standardise import RECORDINGS, Standardise
from rwkv_speech.engine.trainer import fit, make_trainer
from rwkv_speech.engine.validation import Validation
from rwkv_speech.errors import UserError
from rwkv_speech.lm import peft
from rwkv_speech.mission_file import MissionFile, best_mission_files, mission_folder
from rwkv_speech.missions.task import Task
from rwkv_speech.model import SpeechRWKV
from rwkv_speech.ops.common import (
    check_missions,
    check_model_file,
    frozen_parts,
    load_model,
    load_splits,
    missions_of,
    named_mission_files,
    weights_that_stay,
)
from rwkv_speech.options import Options, TrainingOptions
from rwkv_speech.speech.audio import SAMPLE_RATE, AudioError, Longest, duration
from rwkv_speech.speech.augmentation import NOISE_SNR_DB, SPEEDS, SpecAugment, WaveformAugmentation
from rwkv_speech.speech.frame_cache import FrameCache

log = logging.getLogger("rwkv_speech")

ALIGNMENTS = 10_000  # transcripts that are looked at, of a larger corpus, for whether CTC can align them


def train(options: Options) -> int:
    """Trains adapter and initial state; writes mission files into the project."""
    check_model_file(options.model)
    if method := options.training.peft_method:
        peft.configuration(method, {})  # a wrong name is told at once
    machine = fit_to_machine(options.machine)
    with project_lock(options.project, "training"):
        return _train(options, machine)


def _train(options: Options, machine: Machine) -> int:
    training, data = options.training, options.data
    bad_samples = BadSamples(data.on_bad_audio, options.project / "bad_audio.jsonl")
    rows, mix = _training_rows(options, bad_samples)
    validation_rows = []
    if data.valid_split:
        validation_rows = load_splits(data, data.valid_split, (), bad_samples=bad_samples, join=True)["all"]
    pl.seed_everything(training.random_seed, workers=True, verbose=False)
    # On several GPUs Lightning moves the model to each process's own.
    device = "cpu" if machine.accelerator == "gpu" else machine.first_device
    cache = FrameCache(data.cache_features, storage=data.cache_dtype) if data.cache_features else None
    files = named_mission_files(options.model)
    missions = _missions(rows, options.model.mission, files)
    model = load_model(
        *(options.model, files, device, machine, cache),
        missions=missions,
        share_adapter=training.share_adapter,
        merge=False,
    )
    check_missions(rows + validation_rows, model)
    frozen = frozen_parts(model)  # before PiSSA and OLoRA change matrices, by numbers that vary with the threads
    _set_learning(model, options)
    run = find_run(options, frozen | weights_that_stay(model) | {"precision": machine.precision})
    model.language_model.checkpointing = bool(training.grad_cp)
    of_task = {name: [row for row in rows if model.task(row.mission).name == name] for name in model.tasks}
    for name, task in model.tasks.items():
        _set_labels(task, of_task[name], given=bool(options.model.labels))
    judged = {name: [row for row in validation_rows if model.task(row.mission).name == name] for name in model.tasks}
    leading = {name: task.mission.leading_of(judged[name]) for name, task in model.tasks.items()}
    judged_by = (
        f"{fingerprint(validation_rows, model.sample)}, {[x.name for x in leading.values()]}, {options.decoding}"
    )
    several = len(model.tasks) > 1
    mission_files = {
        name: MissionFiles(
            mission_folder(options.project, name, of_several=several),
            run,
            name,
            model.describe(name, language_model=Path(options.model.load_model).name),
            epoch_save=training.epoch_save,
            save_steps=training.save_steps,
            leading=leading[name] if judged[name] else None,
            by_loss=not several,
            judged_by=judged_by,
            average=training.average,
        )
        for name in model.tasks
    }
    metrics = Metrics(options.project, run.id, leading if several else {"": leading[model.task().name]})
    shown = Bar(metrics) if sys.stdout.isatty() else Lines(metrics, options.log_every)  # Lightning's bar goes there
    callbacks = [ReportBadSamples(bad_samples), metrics, shown, *mission_files.values()]
    if cache:
        usable = [row for row in rows if (row.text or "").strip()]
        speeds = _speeds(training)
        wanted = [(replace(x, speed=speed), row) for row in usable for x in row.recordings for speed in speeds]
        wanted += [(x, row) for row in validation_rows for x in row.recordings]
        filling = FillFrames(cache, wanted, bad_samples, _longest(training, model), log_every=options.log_every)
        callbacks.insert(0, filling)
    if validation_rows:
        validation = Validation(
            training,
            options.decoding,
            log_every=options.log_every,
            mission_files=mission_files,
            judged_by=judged_by,
            metrics=metrics,
            bad_samples=bad_samples,
        )
        callbacks.append(validation)
    if training.standardise:
        measured = random.Random(training.random_seed).sample(rows, min(RECORDINGS, len(rows)))
        dataset = _dataset(model, measured, cache, longest=_longest(training, model))
        callbacks.append(Standardise(loader(dataset, batch_size=8, shuffle=False, num_workers=0), model))
    stop = StopRequest()
    what = {
        "the training data": fingerprint(rows, model.sample),
        "the number of processes": machine.per_node * machine.num_nodes,
    }
    trainer = make_trainer(options, machine, run, callbacks, stop, what)
    if validation_rows:
        validation.batches = loader(
            _dataset(model, validation_rows, cache, longest=_longest(training, model)),
            batch_size=options.eval_bsz,
            shuffle=False,
            num_workers=data.num_workers,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
    durations = options.project / "durations.json"
    seconds = read_durations(rows, durations, log_every=options.log_every, first=trainer.is_global_zero)
    if training.ctc_align:
        _check_alignment(rows, seconds, model, first=trainer.is_global_zero)
    accumulate = training.accumulate_grad_batches
    pass_batches = _training_batches(options, rows, mix, seconds, model, cache, trainer)
    batches = AccumulationLoader(pass_batches, accumulate=accumulate, limit=training.epoch_steps)
    steps_to_epoch = math.ceil(len(batches) / accumulate)
    total_steps = steps_to_epoch * training.epoch_count
    if trainer.is_global_zero:
        show_run(
            *(model, options, machine),
            utterances=len(rows),
            seconds=seconds.sum(),
            steps_to_epoch=steps_to_epoch,
            steps_to_pass=math.ceil(len(pass_batches) / accumulate),
        )
    nonfinite = NonFiniteLosses(training.on_nonfinite, options.project / "nonfinite.jsonl", model)
    module = TrainingModule(model, training, total_steps=total_steps, stop=stop, on_nonfinite=nonfinite)
    if not fit(trainer, module, batches, run):
        return stop.exit_status if trainer.is_global_zero else 0
    if not trainer.is_global_zero:
        return 0
    for kept in mission_files.values() if training.average else ():
        kept.write_mean()
    run.finish()
    if not module.utterances and not run.resume_point:
        raise UserError(f"nothing was learnt: no sample could be used; {bad_samples.path} says why of each")
    _check_steps(trainer.global_step, module, nonfinite)
    found = (f"the mission file {path} is {which}" for path, which in best_mission_files(options.project))
    log.info("%s; %s", bad_samples.report(), "; ".join(found))
    return 0


def _training_rows(options: Options, bad_samples: BadSamples) -> tuple[list[Row], Mix | None]:
    """The rows of the splits to train on, and which of them a pass takes, where that isn't all once."""
    data = options.data
    within = data.data_dir or data.data
    weights = split_weights(data.train_split, within) if data.train_split else {}
    asked = "+".join(weights) or None
    splits = load_splits(data, asked, librispeech.TRAIN_SPLIT.split("+"), bad_samples=bad_samples)
    rows = list(chain(*splits.values()))
    if all(weight == 1 for weight in weights.values()):
        return rows, None
    return rows, Mix([*map(len, splits.values())], [*weights.values()], seed=options.training.random_seed)


def _missions(rows: Sequence[Row], asked: str | None, files: Sequence[MissionFile]) -> list[str]:
    """The missions of a run. That of rows which name none comes first: the one asked for, or of the mission file, or
    "transcribe".

    Raises:
        UserError: there are several files, and nothing says of which mission such rows are.
    """
    found = missions_of(rows)
    named = [name for name in found if name]
    if None not in found:
        return [asked] if asked and asked not in named else named  # which no row names: the first one will be refused
    if not asked and len(files) > 1:
        raise UserError(
            "there are several mission files, and rows that name no mission: say by --mission what they are"
        )
    return list(dict.fromkeys([asked or (files[0].mission if files else "transcribe"), *named]))


def _set_learning(model: SpeechRWKV, options: Options) -> None:
    """Lets those parts take gradients that --train_type names.

    Raises:
        UserError: what doesn't learn would be what chance made it.
    """
    parts, method = options.training.parts, options.training.peft_method
    if "adapter" not in parts and not options.model.adapter:
        raise UserError(
            f"--train_type {options.training.train_type} trains beside an adapter that stays as it is: name a mission "
            "file by --adapter"
        )
    if options.training.standardise and ("adapter" not in parts or options.model.adapter):
        raise UserError(
            "--standardise 1 is for a new adapter, since that of a mission file has learnt to read frames as they are"
        )
    if method:
        settings = {} if options.model.load_peft else options.model.peft_config or {}
        there = model.language_model.peft
        if there is None:
            peft.inject(model.language_model, peft.configuration(method, settings))
        elif settings or method != there.method:
            raise UserError(
                f"--train_type {options.training.train_type}: there are weights of {there.method} already, beside the "
                "mission file: train them on by that name, without --peft_config"
            )
    for tensor in model.trained_tensors().values():
        tensor.parameter.requires_grad_(tensor.part in parts or (tensor.part == "peft" and method is not None))


def _set_labels(task: Task, rows: Sequence[Row], *, given: bool) -> None:
    """The labels of a task that chooses: those given, else all that its rows have.

    Raises:
        UserError: a row has another.
    """
    if not task.mission.chooses:
        return
    found = task.mission.labels(rows)
    task.labels = (task.labels if given else None) or found
    if unknown := [label for label in found if label not in task.labels]:
        raise UserError(f"the data has the label {unknown[0]!r}, which is not among --labels {','.join(task.labels)}")


def _dataset(model: SpeechRWKV, rows: Sequence[Row], cache: FrameCache | None, **how: object) -> SpeechDataset:
    return SpeechDataset(
        rows,
        sample_of=model.sample,
        renderer=model.renderer,
        extract=None if cache else model.speech_encoder.extract,
        cache=cache,
        aligned=model.aligned,
        **how,
    )


def _check_alignment(rows: Sequence[Row], seconds: np.ndarray, model: SpeechRWKV, *, first: bool) -> None:
    """Says how many transcripts the CTC loss can't align to their recordings' positions.

    first: whether this is, of a run's processes, the one that says it.

    Raises:
        UserError: it can align none.
    """
    every = math.ceil(len(rows) / ALIGNMENTS)
    found = []
    for row, length in zip(rows[::every], seconds[::every], strict=True):
        if not length or model.task(row.mission).name not in model.aligned:
            continue  # it can't be opened, or isn't for CTC
        with suppress(SampleError):
            tokens = model.tokenizer.encode(model.sample(row).reference)
            frames = model.speech_encoder.frame_count(round(length * SAMPLE_RATE))
            found.append(fits(torch.tensor(tokens), model.adapter.group_count(frames)))
    k = model.adapter.downsample_k
    advice = f"lower --downsample_k, {k} here" if k > 1 else "leave --ctc_align out"
    said = f"{sum(found)} of {len(found)} transcripts{' looked at' * (every > 1)} fit into their positions"
    if found and not any(found):
        raise UserError(f"{said}: {advice}")
    if not all(found) and first:
        log.warning("%s, and --ctc_align leaves out all others: %s", said, advice)


def _check_steps(steps: int, module: TrainingModule, nonfinite: NonFiniteLosses) -> None:
    """Says of a run that is over where so many steps can have taught little.

    Raises:
        UserError: they were all skipped.
    """
    if skipped := len(nonfinite.skipped):
        said = f"{skipped} of {steps} steps were skipped, their losses not finite; {nonfinite.path} lists the batches"
        if skipped == steps:
            raise UserError(f"{said}: nothing was learnt; the model, the encoder or the precision may be at fault")
        log.warning("%s", said)
    warn_of_warm_up(module.options, steps, module.total_steps)


def _training_batches(
    options: Options,
    rows: list[Row],
    mix: Mix | None,
    seconds: np.ndarray,
    model: SpeechRWKV,
    cache: FrameCache | None,
    trainer: pl.Trainer,
) -> DataLoader[Batch]:
    """The batches of this process, augmented as asked; the log says how much of them is padding."""
    training = options.training
    augmentation = WaveformAugmentation(
        training.random_seed,
        speeds=_speeds(training),
        noise=_noise_files(training.noise_dir, skip=options.data.on_bad_audio == "skip") if training.noise_dir else (),
        snr_db=training.noise_snr or NOISE_SNR_DB,
    )
    slowest = min(augmentation.speeds)

    def lengths(epoch: int) -> np.ndarray:
        if mix is None:
            return augmentation.lengths([row.id for row in rows], seconds, epoch)
        taken = mix(epoch)
        ids = [copy_id(rows[i].id, copy) for i, copy in zip(taken, mix.copies, strict=True)]
        return augmentation.lengths(ids, seconds[taken], epoch)

    dataset = _dataset(
        model,
        rows,
        cache,
        transform=augmentation if not cache and (training.speed_perturb or training.noise_dir) else None,
        speed=augmentation.speed if cache and training.speed_perturb else None,
        filter=_too_long(training, slowest),
        longest=_longest(training, model, slowest),
        spec_augment=SpecAugment(training.random_seed, model.speech_encoder.width) if training.spec_augment else None,
        needs_answer=True,
        mix=mix,
    )
    batches = bucketed_loader(
        dataset,
        lengths,
        longest=(seconds if mix is None else mix.longest(seconds)) / slowest,
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
        len(dataset),
        lengths(0).sum() / 3600,
        len(batches),
        100 * padding_waste(batches.batch_sampler, lengths(0)),
    )
    return batches


def _speeds(training: TrainingOptions) -> tuple[float, ...]:
    return SPEEDS if training.speed_perturb else (1.0,)


def _noise_files(folder: str, *, skip: bool) -> list[Path]:
    """The recordings of a folder that can be opened.

    skip: whether others are left out, with a warning, or stop the run.
    """
    found = []
    for path in audio_files(Path(folder).expanduser()):
        try:
            duration(path)
        except AudioError as error:
            if not skip:
                raise UserError(
                    f"--noise_dir: {error}; put it right or remove it, or go on without it by --on_bad_audio skip"
                ) from error
            log.warning("noise that is left out: %s", error)
        else:
            found.append(path)
    if not found:
        raise UserError(f"--noise_dir {folder}: no audio files there; expected recordings of noise")
    return found


def _longest(training: TrainingOptions, model: SpeechRWKV, slowest: float | None = None) -> Longest:
    """What a recording certainly can't exceed, so that no more of it is read; `_too_long` then knows it exactly.

    slowest: the lowest speed that augmentation draws; None: batches have no bound.
    """
    # Two positions more, since the frames of an encoder's edges, and of an incomplete last position, are missing.
    seconds = (training.ctx_len + 2) * model.adapter.downsample_k / model.speech_encoder.frame_rate
    context = Longest(seconds, f"--ctx_len {training.ctx_len} leaves")
    if not slowest or not training.max_batch_s:
        return context
    return min(context, Longest(training.max_batch_s * slowest, "--max_batch_s leaves"))


def _too_long(training: TrainingOptions, slowest: float) -> Callable[[Rendered, Sequence[int]], str | None]:
    """Says of a rendered sample and its recordings' samples why it doesn't fit into the context, or into a batch.

    slowest: the lowest speed that augmentation draws.
    """
    limit = training.max_batch_s and training.max_batch_s * slowest

    def reason(rendered: Rendered, samples: Sequence[int]) -> str | None:
        if limit and sum(samples) > limit * SAMPLE_RATE:
            return f"{sum(samples) / SAMPLE_RATE:.1f} s, more than the {limit:g} s that --max_batch_s leaves"
        if len(rendered) > training.ctx_len and len(rendered.answers) == 1:  # several rounds are learnt in pieces
            return f"{len(rendered)} positions, more than --ctx_len {training.ctx_len}"
        return None

    return reason
