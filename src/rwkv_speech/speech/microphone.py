"""What the microphone hears, where the package `sounddevice` is installed."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

from rwkv_speech.speech.audio import SAMPLE_RATE, AudioError


def has_microphone() -> bool:
    """Whether `sounddevice` is installed; whether a microphone is there, only `record` and `listen` find out."""
    return importlib.util.find_spec("sounddevice") is not None


def record(wait: Callable[[], object]) -> Tensor:
    """What the microphone hears until `wait` returns: (samples,) float32, 16 kHz.

    Raises:
        AudioError: there is no microphone, it can't be used, or it heard nothing.
    """
    blocks: list[np.ndarray] = []
    with _open(blocks.append):
        wait()
    if not blocks:
        raise AudioError("microphone: nothing was heard")
    return torch.from_numpy(np.concatenate(blocks))


def listen() -> Iterator[Tensor]:
    """What the microphone hears, without end: each time all that came since the last, (samples,) float32, 16 kHz.

    Raises:
        AudioError: there is no microphone, or it can't be used.
    """
    blocks: SimpleQueue[np.ndarray] = SimpleQueue()
    with _open(blocks.put):
        while True:
            found = [blocks.get()]
            while not blocks.empty():
                found.append(blocks.get())
            yield torch.from_numpy(np.concatenate(found))


@contextmanager
def _open(take: Callable[[np.ndarray], None]) -> Iterator[None]:
    """Gives blocks (samples,) to `take`, in another thread."""
    try:
        import sounddevice  # not installed everywhere, and looks for devices when it is imported
    except (ImportError, OSError) as error:
        raise AudioError(f"microphone: {error}; pip install sounddevice, which needs the library PortAudio") from None
    try:
        with sounddevice.InputStream(
            samplerate=SAMPLE_RATE,
            channels=1,
            dtype="float32",
            callback=lambda block, *_: take(block[:, 0].copy()),
        ):
            yield
    except sounddevice.PortAudioError as error:
        raise AudioError(f"microphone: {error}; give an audio file instead") from None
