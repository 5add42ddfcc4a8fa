"""What the program does: train, eval, predict, each a short story in the words of the rooms below.

Each gives the exit status.
"""

import glob
import logging
import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from rich.console import Console
from torch.utils.data import DataLoader

from rwkv_speech.data import librispeech
from rwkv_speech.data.bad_samples import BadSamples
from rwkv_speech.data.batches import AccumulationLoader, Batch, SpeechDataset, loader
from rwkv_speech.data.buckets import bucketed_loader, padding_waste
from rwkv_speech.data.durations import read_durations
from rwkv_speech.data.row import Utterance
from rwkv_speech.data.sources import LIBRISPEECH, load_split
from rwkv_speech.engine.callbacks import FillFeatures, NonFinite, ReportBadSamples
from rwkv_speech.engine.evaluation import check_ids, claim, evaluate, write_json
from rwkv_speech.engine.machine import Machine, fit_to_machine, launched, make_fabric, peak_memory
from rwkv_speech.engine.metrics import Bar, Metrics
from rwkv_speech.engine.mission_files import MissionFiles
from rwkv_speech.engine.overview import show_run
from rwkv_speech.engine.runs import find_run
from rwkv_speech.engine.trainer import fit, make_trainer
from rwkv_speech.engine.validation import Validation
from rwkv_speech.errors import UserError
from rwkv_speech.files import write_whole
from rwkv_speech.learning import Alignment, Optimisation
from rwkv_speech.lm import wkv
from rwkv_speech.model import SpeechRWKV
from rwkv_speech.options import Options
from rwkv_speech.speech.audio import SAMPLE_RATE
from rwkv_speech.speech.augmentation import NOISE_SNR_DB, ROBUSTNESS, SPEEDS, SpecAugment, WaveformAugmentation
from rwkv_speech.speech.encoder import SpeechEncoder
from rwkv_speech.speech.frame_cache import FrameCache
from rwkv_speech.trained import newest_mission_file
from rwkv_speech.transcription import FORMATS, output_files

log = logging.getLogger("rwkv_speech")

AUDIO_SUFFIXES = librispeech.AUDIO_SUFFIXES


def train(options: Options) -> int:
    """Trains adapter and initial state; writes mission files into the project."""
    _check_model_file(options)
    machine = fit_to_machine(options)
    run = find_run(options)
    bad_audio = BadSamples(options.on_bad_audio, options.project / "bad_audio.jsonl")
    (utterances,) = _splits(options, options.train_split, librispeech.TRAIN_SPLIT.split("+"), join=True).values()
    validated = _splits(options, options.valid_split, (), join=True)["train"] if options.valid_split else []
    pl.seed_everything(options.random_seed, workers=True, verbose=False)
    # On several GPUs Lightning moves the model to each process's own.
    device = "cpu" if machine.accelerator == "gpu" else machine.first_device
    features = FrameCache(options.cache_features, storage=options.cache_dtype) if options.cache_features else None
    model = _load(options, options.adapter, device, machine, features)
    model.language_model.checkpointing = bool(options.grad_cp)
    model.on_nonfinite = NonFinite(options.on_nonfinite, options.project / "nonfinite.jsonl", model)
    model.spec_augment = SpecAugment(options.random_seed) if options.spec_augment else None
    mission_files = MissionFiles(
        options.project,
        run,
        model.describe(mission="transcribe", language_model=Path(options.load_model).name),
        epoch_save=options.epoch_save,
        save_steps=options.save_steps,
        by_wer=bool(options.valid_split),
        average=options.average,
    )
    metrics = Metrics(options.project, run.id)
    callbacks = [ReportBadSamples(bad_audio), metrics, Bar(metrics), mission_files]
    if options.valid_split:
        validation = Validation(options, mission_files=mission_files, metrics=metrics, bad_audio=bad_audio)
        callbacks.append(validation)
    if features:
        callbacks.insert(0, FillFeatures(features, utterances + validated, bad_audio))
    trainer = make_trainer(options, machine, run, callbacks)
    if options.valid_split:
        validation.batches = loader(
            SpeechDataset(validated, features=features),
            batch_size=options.eval_bsz,
            shuffle=False,
            num_workers=options.num_workers,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
    seconds = read_durations(utterances, options.project / "durations.json", first=trainer.is_global_zero)
    if trainer.is_global_zero:
        show_run(model, options, machine, utterances=len(utterances), seconds=seconds.sum())
    batches = AccumulationLoader(
        _training_batches(options, utterances, seconds, model, features, trainer),
        accumulate=options.accumulate_grad_batches,
        count=lambda text: len(model.tokenizer.encode(text)) + 1,
        limit=options.epoch_steps,
    )
    model.alignment = Alignment(weight=options.ctc_align, alone_steps=options.ctc_align_steps)
    model.optimisation = Optimisation(
        lr_init=options.lr_init,
        lr_final=options.lr_final or options.lr_init,
        warmup_steps=options.warmup_steps,
        state_lr_scale=options.state_lr_scale,
        betas=(options.beta1, options.beta2),
        eps=options.adam_eps,
        weight_decay=options.weight_decay,
        total_steps=math.ceil(len(batches) / options.accumulate_grad_batches) * options.epoch_count,
    )
    if not fit(trainer, model, batches, run):
        return 128 + signal.SIGTERM if trainer.is_global_zero else 0
    if trainer.is_global_zero:
        if options.average:
            mission_files.write_mean()
        run.finish()
    log.info("%s; the newest mission file is %s", bad_audio.report(), newest_mission_file(options.project))
    return 0


def evaluate_splits(options: Options) -> int:
    """Measures error rates; hypotheses, summary and report go to `eval/` in the project."""
    from rwkv_speech.scoring import score, score_table, summary, write_report

    _check_model_file(options)
    machine = fit_to_machine(options)
    adapter = Path(options.adapter).expanduser() if options.adapter else newest_mission_file(options.project)
    log.info("evaluating %s", adapter)
    bad_audio = BadSamples(options.on_bad_audio, options.project / "bad_audio.jsonl")
    splits = _splits(options, options.eval_split, librispeech.EVAL_SPLITS)
    changes = (None, *(ROBUSTNESS if options.perturb else ()))
    rows = {f"{name}, {change.name}" if change else name: (name, change) for name in splits for change in changes}
    files = _file_names(rows)
    for utterances in splits.values():
        check_ids(utterances)
    fabric = make_fabric(machine)
    model = _load(options, adapter, fabric.device, machine)
    folder = options.project / "eval"
    scores: dict[str, Any] = {}
    with launched(fabric):
        if fabric.is_global_zero:
            asked = ("load_model", "data", "data_dir", "beam", "max_new_tokens", "loop_guard")
            written = datetime.fromtimestamp(adapter.stat().st_mtime).isoformat()
            settings = {name: getattr(options, name) for name in asked} | {
                **{"adapter": str(adapter), "adapter_written": written},
                **{"encoder": model.speech_encoder.name, "precision": machine.precision},
            }
            claim(folder, settings, resume=options.resume)
        for row, (name, change) in rows.items():
            records = evaluate(
                model,
                splits[name],
                name=files[row],
                change=change,
                options=options,
                fabric=fabric,
                bad_audio=bad_audio,
            )
            if fabric.is_global_zero:
                left_out = len(splits[name]) - len(records)
                scores[row] = score(records, left_out=left_out, peak_memory=peak_memory(fabric.device))
    if not fabric.is_global_zero:
        return 0
    write_json(folder / "summary.json", {"adapter": str(adapter)} | summary(scores))
    write_report(folder / "report.html", scores)
    Console().print(score_table(scores))
    for row, result in scores.items():
        texts = result.raw
        print(f"{row}: WER {texts.words.rate:.2%}, mean of utterances {texts.mean_utterance_wer:.2%}")
    left_out = sum(result.left_out for result in scores.values())
    bad = f"{left_out} bad samples left out, listed in {bad_audio.path}" if left_out else "no bad samples"
    log.info("%s; %s holds hypotheses, summary.json and report.html", bad, folder)
    return 0


def predict(options: Options) -> int:
    """Transcribes files: to standard output, and nothing else there, or each into a file of its own.

    A file that can't be used is named in the log; the others go on, and the exit status is 1.
    """
    paths = list(_audio_files(options.file_path or []))
    folder = Path(options.output_dir).expanduser() if options.output_dir else None
    places = output_files(paths, folder, options.format) if folder else None
    if not places and len(paths) > 1 and options.format in ("srt", "vtt"):
        raise UserError(f"--format {options.format} of {len(paths)} files needs --output_dir: a folder for them")
    _check_model_file(options)
    machine = fit_to_machine(options)
    adapter = Path(options.adapter).expanduser() if options.adapter else newest_mission_file(options.project)
    model = _load(options, adapter, machine.first_device, machine)
    transcripts = model.transcripts(
        paths,
        batch_size=options.eval_bsz,
        max_audio_s=options.max_audio_s,
        beam=options.beam,
        n_best=options.beam if options.format == "json" else 1,
        max_new_tokens=options.max_new_tokens,
        loop_guard=options.loop_guard,
    )
    failed = 0
    for index, transcript in enumerate(transcripts):
        if isinstance(transcript, UserError):
            log.error("%s", transcript)
            failed += 1
        elif places:
            write_whole(places[index], FORMATS[options.format](transcript).encode())
        else:
            print(FORMATS[options.format](transcript), end="", flush=True)
    if failed:
        log.error("%d of %d files could not be transcribed", failed, len(paths))
    return int(failed > 0)


OPS: dict[str, Callable[[Options], int]] = {"train": train, "eval": evaluate_splits, "predict": predict}


def _check_model_file(options: Options) -> None:
    """Says first what would otherwise come to light last, after the data and the encoder were found."""
    if not Path(options.load_model).expanduser().is_file():
        raise UserError(f"{options.load_model}: does not exist; expected RWKV-6 weights, .pth or .safetensors")


def _load(
    options: Options,
    adapter: str | Path | None,
    device: torch.device | str,
    machine: Machine,
    features: FrameCache | None = None,
) -> SpeechRWKV:
    wkv.set_backend(options.wkv)
    model = SpeechRWKV.from_pretrained(
        options.load_model,
        encoder=options.encoder,
        adapter=adapter,
        device=device,
        dtype=machine.dtype,
        downsample_k=options.downsample_k,
        adapter_hidden=options.adapter_hidden,
        load_encoder=features.encoder if features else SpeechEncoder.from_pretrained,
    )
    sizes = model.language_model.sizes
    for flag, said, is_so in (("n_layer", options.n_layer, sizes.n_layer), ("n_embd", options.n_embd, sizes.n_embd)):
        if said is not None and said != is_so:
            raise UserError(f"--{flag} {said}, but {options.load_model} has {is_so}; leave the flag out")
    return model


def _splits(
    options: Options, asked: str | None, defaults: tuple[str, ...] | list[str], *, join: bool = False
) -> dict[str, list[Utterance]]:
    """The utterances of each split by its name: those asked for, else those of the defaults that are there."""
    names: list[str | None] = asked.split("+") if asked else [None]
    if not asked and options.data == LIBRISPEECH:
        root = Path(options.data_dir).expanduser() if options.data_dir else None
        here = [n for n in defaults if not root or (root / n).is_dir() or (root / "LibriSpeech" / n).is_dir()]
        names = list(defaults) if options.download else here or [None]
        if here and len(here) < len(defaults):
            log.info("of %s, %s holds %s", ", ".join(defaults), root, ", ".join(here))
    settings = {
        "data": options.data,
        "data_dir": options.data_dir,
        "audio_column": options.audio_column,
        "text_column": options.text_column,
        "download": options.download,
    }
    if join:
        return {"train": load_split("+".join(n for n in names if n) or None, **settings)}
    return {name or "all": load_split(name, **settings) for name in names}


def _training_batches(
    options: Options,
    utterances: list[Utterance],
    seconds: np.ndarray,
    model: SpeechRWKV,
    features: FrameCache | None,
    trainer: pl.Trainer,
) -> DataLoader[Batch]:
    """The batches of this process, augmented as asked; the log tells how much of them is padding."""
    change = WaveformAugmentation(
        options.random_seed,
        speeds=SPEEDS if options.speed_perturb else (1.0,),
        noise=_noise_files(options.noise_dir) if options.noise_dir else (),
        snr_db=options.noise_snr or NOISE_SNR_DB,
    )
    lengths = partial(change.lengths, [utterance.id for utterance in utterances], seconds)
    slowest = min(change.speeds)
    check = _too_long(model, options.ctx_len, seconds=options.max_batch_s and options.max_batch_s * slowest)
    changed = options.speed_perturb or options.noise_dir
    batches = bucketed_loader(
        SpeechDataset(utterances, check=check, change=change if changed else None, features=features),
        lengths,
        longest=seconds / slowest,
        batch_size=options.micro_bsz,
        max_seconds=options.max_batch_s,
        accumulate=options.accumulate_grad_batches,
        seed=options.random_seed,
        num_workers=options.num_workers,
        rank=trainer.global_rank,
        world_size=trainer.world_size,
    )
    log.info(
        "training on %d utterances, %.1f h, in %d batches to a pass; %.1f %% of them is padding",
        len(utterances),
        seconds.sum() / 3600,
        len(batches),
        100 * padding_waste(batches.batch_sampler, lengths(0)),
    )
    return batches


def _noise_files(folder: str) -> list[Path]:
    found = sorted(path for path in Path(folder).expanduser().rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
    if not found:
        raise UserError(f"--noise_dir {folder}: no audio files there; expected recordings of noise")
    return found


def _too_long(
    model: SpeechRWKV, ctx_len: int, *, seconds: float | None = None
) -> Callable[[Utterance, int], str | None]:
    """Says of an utterance and its number of samples why it doesn't fit into the context, or into a batch."""

    def reason(utterance: Utterance, samples: int) -> str | None:
        if seconds and samples > seconds * SAMPLE_RATE:
            return f"{samples / SAMPLE_RATE:.1f} s, more than the {seconds:g} s that --max_batch_s leaves"
        positions = model.positions(samples, utterance.text)
        return f"{positions} positions, more than --ctx_len {ctx_len}" if positions > ctx_len else None

    return reason


def _audio_files(patterns: list[str]) -> Iterator[str]:
    """Files, the audio files of folders, and what globs find, in the order given."""
    for pattern in patterns:
        if os.path.isdir(pattern):
            found = sorted(str(p) for p in Path(pattern).rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES)
        elif os.path.exists(pattern) or not glob.has_magic(pattern):
            found = [pattern]
        else:
            found = sorted(glob.glob(pattern, recursive=True))
        if not found:
            raise UserError(f"--file_path {pattern}: no audio files there")
        yield from found


def _file_names(rows: Iterable[str]) -> dict[str, str]:
    """File names for the rows of an evaluation; that of a path is its last part."""
    names: dict[str, str] = {}
    for row in rows:
        name = Path(row).name.replace(", ", "-").replace(" ", "-").removesuffix(".jsonl").removesuffix(".json")
        if name in names.values():
            raise UserError(f"--eval_split: two of the splits would go to eval/{name}.jsonl: give each a --proj_dir")
        names[row] = name
    return names
