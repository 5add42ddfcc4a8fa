"""Speech made harder on purpose, to see where a system falls apart: another speed, white noise."""

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_speech.speech.audio import SAMPLE_RATE, to_mono_16k


@dataclass(frozen=True)
class Perturbation:
    """One way to change a recording.

    name: as reports call it.
    speed: as if played so many times as fast, the pitch going with it.
    snr_db: white noise so many decibels below the mean power of the speech; None: no noise.
    """

    name: str
    speed: float = 1.0
    snr_db: float | None = None

    def __call__(self, id: str, waveform: Tensor) -> Tensor:
        """waveform (samples,) at 16 kHz -> (samples / speed,). The noise depends on the utterance's id alone."""
        if self.speed != 1.0:
            waveform = to_mono_16k(waveform.numpy(), round(SAMPLE_RATE * self.speed))
        if self.snr_db is not None:
            noise = torch.randn(waveform.shape, generator=torch.Generator().manual_seed(zlib.crc32(id.encode())))
            waveform = waveform + noise * (waveform.square().mean() / 10 ** (self.snr_db / 10)).sqrt()
        return waveform


ROBUSTNESS = (
    Perturbation("speed 0.9", speed=0.9),
    Perturbation("speed 1.1", speed=1.1),
    Perturbation("noise 20 dB", snr_db=20.0),
    Perturbation("noise 10 dB", snr_db=10.0),
    Perturbation("noise 0 dB", snr_db=0.0),
)
