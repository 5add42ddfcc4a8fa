"""Speech made harder on purpose, to see where a system falls apart: another speed, white noise."""

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_speech.speech.audio import SAMPLE_RATE, to_mono_16k


def at_speed(waveform: Tensor, speed: float) -> Tensor:
    """As if played so many times as fast, the pitch going with it: (samples,) at 16 kHz -> (samples / speed,)."""
    return waveform if speed == 1.0 else to_mono_16k(waveform.numpy(), round(SAMPLE_RATE * speed))


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
    speed: see `at_speed`.
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
