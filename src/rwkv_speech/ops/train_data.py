"""What a training run reads: its rows, its batches, and how long a recording may be."""

import logging
import math
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
from rwkv_speech.data.listing import audio_files
from rwkv_speech.data.mixing import Mix
from rwkv_speech.data.rendering import Rendered
from rwkv_speech.data.sample import Row, SampleError
from rwkv_speech.data.sources import split_weights
from rwkv_speech.errors import UserError
from rwkv_speech.model import SpeechRWKV
from rwkv_speech.ops.common import load_splits
from rwkv_speech.options import Options, TrainingOptions
from rwkv_speech.speech.audio import SAMPLE_RATE, AudioError, Longest, duration
from rwkv_speech.speech.augmentation import NOISE_SNR_DB, SPEEDS, SpecAugment, WaveformAugmentation
from rwkv_speech.speech.frame_cache import FrameCache
from rwkv_speech.speech.recording import Recording

log = logging.getLogger("rwkv_speech")

ALIGNMENTS = 10_000  # transcripts that are looked at, of a larger corpus, for whether CTC can align them


def training_rows(options: Options, bad_samples: BadSamples) -> tuple[list[Row], Mix | None]:
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


def dataset_of(model: SpeechRWKV, rows: Sequence[Row], cache: FrameCache | None, **how: object) -> SpeechDataset:
    """Reads rows for a model; how: what else `SpeechDataset` takes."""
    return SpeechDataset(
        rows,
        sample_of=model.sample,
        renderer=model.renderer,
        extract=None if cache else model.speech_encoder.extract,
        cache=cache,
        aligned=model.aligned,
        **how,
    )


def recordings_to_cache(
    rows: Sequence[Row], validation_rows: Sequence[Row], training: TrainingOptions
) -> list[tuple[Recording, Row]]:
    """All recordings whose frames a run reads, with their rows; those to learn from at each speed that may be drawn."""
    usable = [row for row in rows if (row.text or "").strip()]
    speeds = _speeds(training)
    wanted = [(replace(x, speed=speed), row) for speed in speeds for row in usable for x in row.recordings]
    return wanted + [(x, row) for row in validation_rows for x in row.recordings]


def training_batches(
    options: Options,
    rows: list[Row],
    mix: Mix | None,
    seconds: np.ndarray,
    model: SpeechRWKV,
    cache: FrameCache | None,
    trainer: pl.Trainer,
) -> DataLoader[Batch]:
    """The batches of this process, augmented as asked; the log says how much of them is padding.

    seconds: (rows,), the lengths of the recordings of each.
    mix: which rows an epoch takes; None: all once.
    """
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

    dataset = dataset_of(
        model,
        rows,
        cache,
        transform=augmentation if not cache and (training.speed_perturb or training.noise_dir) else None,
        speed=augmentation.speed if cache and training.speed_perturb else None,
        filter=_too_long(training, slowest),
        longest=longest_of(training, model, slowest),
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


def longest_of(training: TrainingOptions, model: SpeechRWKV, slowest: float | None = None) -> Longest:
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


def check_alignment(rows: Sequence[Row], seconds: np.ndarray, model: SpeechRWKV, *, first: bool) -> None:
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
