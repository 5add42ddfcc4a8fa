"""Training: adapter and initial state learn; mission files come out."""

import importlib.util
import logging
import math
import os
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl

from rwkv_speech.data.bad_samples import BadSamples
from rwkv_speech.data.durations import read_durations
from rwkv_speech.data.loading import AccumulationLoader, loader
from rwkv_speech.data.sample import Row, fingerprint
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
from rwkv_speech.ops.train_data import (
    check_alignment,
    dataset_of,
    longest_of,
    recordings_to_cache,
    training_batches,
    training_rows,
)
from rwkv_speech.options import Options
from rwkv_speech.speech.frame_cache import FrameCache

log = logging.getLogger("rwkv_speech")


def train(options: Options) -> int:
    """Trains adapter and initial state; writes mission files into the project."""
    check_model_file(options.model)
    if method := options.training.peft_method:
        peft.configuration(method, {})  # a wrong name is told at once
    machine = fit_to_machine(options.machine)
    if options.training.compile:
        _check_compiling(machine)
    with project_lock(options.project, "training"):
        return _train(options, machine)


def _train(options: Options, machine: Machine) -> int:
    training, data = options.training, options.data
    bad_samples = BadSamples(data.on_bad_audio, options.project / "bad_audio.jsonl")
    rows, mix = training_rows(options, bad_samples)
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
    if training.compile:
        if model.language_model.quant:
            raise UserError("--compile goes with --quant none: packed matrices are unpacked one by one")
        model.language_model.compile_blocks()
        log.info("the language model's blocks are compiled in the first steps, which takes a minute or two")
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
        wanted = recordings_to_cache(rows, validation_rows, training)
        filling = FillFrames(cache, wanted, bad_samples, longest_of(training, model), log_every=options.log_every)
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
        dataset = dataset_of(model, measured, cache, longest=longest_of(training, model))
        callbacks.append(Standardise(loader(dataset, batch_size=8, shuffle=False, num_workers=0), model))
    stop = StopRequest()
    what = {
        "the training data": fingerprint(rows, model.sample),
        "the number of processes": machine.per_node * machine.num_nodes,
    }
    trainer = make_trainer(options, machine, run, callbacks, stop, what)
    if validation_rows:
        validation.batches = loader(
            dataset_of(model, validation_rows, cache, longest=longest_of(training, model)),
            batch_size=options.eval_bsz,
            shuffle=False,
            num_workers=data.num_workers,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
    durations = options.project / "durations.json"
    seconds = read_durations(rows, durations, log_every=options.log_every, first=trainer.is_global_zero)
    if training.ctc_align:
        check_alignment(rows, seconds, model, first=trainer.is_global_zero)
    accumulate = training.accumulate_grad_batches
    pass_batches = training_batches(options, rows, mix, seconds, model, cache, trainer)
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


def _check_compiling(machine: Machine) -> None:
    """Raises UserError: what compiles is not here."""
    on_gpu = machine.accelerator == "gpu"
    if on_gpu and importlib.util.find_spec("triton") is None:
        raise UserError("--compile needs triton on a GPU: pip install triton, or leave it out")
    compilers = [os.environ.get("CXX", "c++"), *([os.environ.get("CC", "cc")] if on_gpu else [])]
    for compiler in compilers:
        if shutil.which(compiler.split()[0]) is None:
            raise UserError(f"--compile needs a C++ compiler, and there is no {compiler}: install one, or leave it out")


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
