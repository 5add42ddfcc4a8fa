"""Augmentation of training speech: another speed, noise, masks on the encoder's frames.

Every draw is a function of the run's seed, the epoch and the utterance's id: neither the number of loader workers or
processes nor an interruption of the run changes what training sees.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from torch import Tensor

from rwkv_speech.files import printable
from rwkv_speech.speech.audio import SAMPLE_RATE, AudioError, at_speed, check_waveform, load_audio, to_mono_16k

log = logging.getLogger("rwkv_speech")

SPEEDS = (0.9, 1.0, 1.1)  # Ko et al. 2015, "Audio augmentation for speech recognition"
NOISE_SNR_DB = (5.0, 20.0)

# Masks of a sample: how many, and the most that one takes of the utterance or of the channels. The channels of an
# encoder say more than mel bands do: their masks are smaller than SpecAugment's, a third of the bands.
TIME_MASKS, TIME_PART = 2, 0.1
CHANNEL_MASKS, CHANNEL_PART = 2, 0.1


@dataclass(frozen=True)
class WaveformAugmentation:
    """Changes the waveform of a sample anew in each epoch; a callable for `SpeechDataset(transform=...)`.

    seed: the run's.
    speeds: one is drawn for a sample, each as likely as the others; the pitch goes with it.
    noise: recordings of noise, of which one is drawn and added; none: no noise.
    snr_db: lowest and highest ratio of the speech's mean power to the noise's, drawn uniformly in dB.
    """

    seed: int
    speeds: Sequence[float] = (1.0,)
    noise: Sequence[Path] = ()
    snr_db: tuple[float, float] = NOISE_SNR_DB

    def __call__(self, id: str, waveform: Tensor, epoch: int) -> Tensor:
        """waveform (samples,) at 16 kHz -> (about samples / speed,).

        In the place of noise that can't be used comes the next one, with a warning.
        """
        waveform = at_speed(waveform, self.speed(id, epoch))
        if self.noise:
            draw = np.random.default_rng(_number(self.seed, epoch, id, "noise"))
            first, start, snr_db = draw.integers(len(self.noise)), draw.random(), draw.uniform(*self.snr_db)
            for index in range(first, first + len(self.noise)):
                path = self.noise[index % len(self.noise)]
                try:
                    noise = _excerpt(path, start, len(waveform) / SAMPLE_RATE)
                except AudioError as error:
                    _warn(str(error))
                    continue
                noise = noise.repeat(-(-len(waveform) // len(noise)))[: len(waveform)]
                return with_noise(waveform, noise, snr_db)
        return waveform

    def speed(self, id: str, epoch: int) -> float:
        """The speed of a sample, as a multiple of its own."""
        return self.speeds[_number(self.seed, epoch, id, "speed") % len(self.speeds)]

    def lengths(self, ids: Sequence[str], seconds: np.ndarray, epoch: int) -> np.ndarray:
        """What an epoch makes of the lengths of utterances: (utterances,) s -> the same."""
        if len(self.speeds) == 1:
            return seconds / self.speeds[0]
        return seconds / np.fromiter((self.speed(id, epoch) for id in ids), float)


class Masks(NamedTuple):
    """What SpecAugment masks of one recording or, with a batch dimension before, of several."""

    frames: Tensor
    """(F,) bool."""
    channels: Tensor
    """(width,) bool."""


@dataclass(frozen=True)
class SpecAugment:
    """Masks stretches of time and bands of channels, as Park et al. 2019 ("SpecAugment") do with mel spectrograms.

    The masks are drawn by a loader's workers, and applied on the device by `apply_masks`.

    seed: the run's.
    width: channels of a frame.
    """

    seed: int
    width: int

    def __call__(self, id: str, frames: int, epoch: int) -> Masks:
        """The masks of a sample with so many frames, in an epoch."""
        draw = np.random.default_rng(_number(self.seed, epoch, id, "masks"))
        masks = Masks(torch.zeros(frames, dtype=torch.bool), torch.zeros(self.width, dtype=torch.bool))
        for mask, count, part in ((masks.frames, TIME_MASKS, TIME_PART), (masks.channels, CHANNEL_MASKS, CHANNEL_PART)):
            for _ in range(count):
                first, end = _stretch(draw, len(mask), part)
                mask[first:end] = True
        return masks


def apply_masks(frames: Tensor, lengths: Tensor, masks: Masks) -> Tensor:
    """frames (B, F, width), zero beyond lengths (B,), and masks (B, F) and (B, width) -> masked frames, as many.

    In the paper masked values become zero, which is the mean of their normalised spectrograms. Encoder frames are not
    normalised: here each channel becomes its mean over the utterance. Beyond the lengths, masked channels take it, too;
    the adapter leaves those frames out.
    """
    mean = frames.sum(1, keepdim=True, dtype=torch.float32) / lengths[:, None, None]  # (B, 1, width)
    return torch.where(masks.frames[:, :, None] | masks.channels[:, None], mean.to(frames.dtype), frames)


def _stretch(draw: np.random.Generator, size: int, part: float) -> tuple[int, int]:
    """Where a mask begins and ends: its length uniform from none to `part` of the size, its place uniform, too."""
    length = int(draw.integers(int(part * size) + 1))
    first = int(draw.integers(size - length + 1))
    return first, first + length


def _excerpt(path: Path, start: float, seconds: float) -> Tensor:
    """Part of a recording, (samples,) at 16 kHz, which begins at a fraction `start` of it.

    It goes round behind the recording's end, and is no longer than that. The whole is read only where libsndfile
    doesn't know the format.

    Raises:
        AudioError: what is read can't be used.
    """
    name = printable(path)
    try:
        with soundfile.SoundFile(path) as file:
            first, frames = int(start * file.frames), math.ceil(seconds * file.samplerate)
            file.seek(first)
            block = file.read(frames, "float32", always_2d=True)
            file.seek(0)
            block = np.concatenate([block, file.read(min(first, frames - len(block)), "float32", always_2d=True)])
            return check_waveform(to_mono_16k(block, file.samplerate), name)
    except (soundfile.SoundFileError, OSError, TypeError, ValueError):
        whole = load_audio(path, name=name)
        return whole.roll(-int(start * len(whole)))


@functools.lru_cache
def _warn(error: str) -> None:
    """Once of each."""
    log.warning("noise that can't be used: %s", error)


def _number(seed: int, epoch: int, id: str, what: str) -> int:
    """A number of 64 bits for one draw, alike for nothing else."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {epoch} {what} {id}".encode(), digest_size=8).digest())


def with_noise(waveform: Tensor, noise: Tensor, snr_db: float) -> Tensor:
    """Adds noise (samples,) at such a level that the mean power of the waveform (samples,) is `snr_db` above its.

    A silent waveform stays as it is, and so it does with silent noise.
    """
    power = noise.square().mean() * 10 ** (snr_db / 10)
    return waveform + noise * (waveform.square().mean() / power).sqrt() if power > 0 else waveform


@dataclass(frozen=True)
class Perturbation:
    """One way to change a recording.

    name: as reports call it.
    speed: see `audio.at_speed`.
    snr_db: white noise so many decibels below the mean power of the speech; None: no noise.
    """

    name: str
    speed: float = 1.0
    snr_db: float | None = None

    def __call__(self, id: str, waveform: Tensor, epoch: int = 0) -> Tensor:
        """waveform (samples,) at 16 kHz -> (samples / speed,). The noise depends on the utterance's id alone."""
        waveform = at_speed(waveform, self.speed)
        if self.snr_db is not None:
            noise = torch.randn(waveform.shape, generator=torch.Generator().manual_seed(zlib.crc32(id.encode())))
            waveform = with_noise(waveform, noise, self.snr_db)
        return waveform


ROBUSTNESS = (
    Perturbation("speed 0.9", speed=0.9),
    Perturbation("speed 1.1", speed=1.1),
    Perturbation("noise 20 dB", snr_db=20.0),
    Perturbation("noise 10 dB", snr_db=10.0),
    Perturbation("noise 0 dB", snr_db=0.0),
)
