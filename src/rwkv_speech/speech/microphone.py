"""Recording from the microphone, where the package `sounddevice` is installed."""

import importlib.util
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from rwkv_speech.speech.audio import SAMPLE_RATE, AudioError


def has_microphone() -> bool:
    """Whether `sounddevice` is installed; whether a microphone is there, only `record` finds out."""
    return importlib.util.find_spec("sounddevice") is not None


def record(wait: Callable[[], object]) -> Tensor:
    """What the microphone hears until `wait` returns: (samples,) float32, 16 kHz.

    Raises:
        AudioError: there is no microphone, it can't be used, or it heard nothing.
    """
    try:
        import sounddevice  # not installed everywhere, and looks for devices when it is imported
    except (ImportError, OSError) as error:
        raise AudioError(f"microphone: {error}; pip install sounddevice, which needs the library PortAudio") from None
    blocks: list[np.ndarray] = []
    try:
        with sounddevice.InputStream(
            samplerate=SAMPLE_RATE,
            channels=1,
            dtype="float32",
            callback=lambda block, *_: blocks.append(block[:, 0].copy()),
        ):
            wait()
    except sounddevice.PortAudioError as error:
        raise AudioError(f"microphone: {error}; type, or give a file by /audio") from None
    if not blocks:
        raise AudioError("microphone: nothing was heard")
    return torch.from_numpy(np.concatenate(blocks))
