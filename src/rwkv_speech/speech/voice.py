"""Probability of speech, 31 times a second, by the network of silero-vad with the weights that its package ships.

The package itself is not imported: that would bind the whole process to one thread. Nor is its TorchScript run, which
goes frame by frame; here the convolutions run over all frames at once, and an hour takes a few seconds of one core.
"""

import functools
import importlib.util
import threading
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_speech.errors import UserError

FRAME = 512  # samples at 16 kHz to one probability
_CONTEXT = 64  # samples before a frame that are seen with it
_HOP = 128
_BINS = 129  # of a Fourier transform of 256 samples

Memory = tuple[Tensor, tuple[Tensor, Tensor]]  # the last samples seen, and the state of the LSTM


class VoiceActivity(nn.Module):
    """silero-vad 6 for 16 kHz; made by `voice_activity`."""

    def __init__(self) -> None:
        super().__init__()
        self.stft = nn.Conv1d(1, 2 * _BINS, 256, stride=_HOP, bias=False)
        sizes = (_BINS, 128, 1), (128, 64, 2), (64, 64, 2), (64, 128, 1)  # channels in, channels out, stride
        self.encoder = nn.ModuleList(nn.Conv1d(i, o, 3, stride=stride, padding=1) for i, o, stride in sizes)
        self.rnn = nn.LSTM(128, 128)
        self.decoder = nn.Conv1d(128, 1, 1)

    @torch.no_grad()
    def forward(self, samples: Tensor, memory: Memory | None = None) -> tuple[Tensor, Memory]:
        """Probabilities of speech in [0, 1], one for each frame.

        Args:
            samples: (samples,) float32 at 16 kHz, at least one. Zeros complete the last frame, so that whatever goes on
                must be given in whole frames.
            memory: what the call for the samples before has returned; None at the beginning.

        Returns:
            (frames,) probabilities, frames = samples / 512 rounded up, and the memory.
        """
        context, state = memory or (samples.new_zeros(_CONTEXT), None)
        samples = F.pad(samples, (0, -len(samples) % FRAME))
        x = torch.cat([context, samples])
        context = x[-_CONTEXT:]
        x = x.unfold(0, _CONTEXT + FRAME, FRAME)[:, None]  # (frames, 1, 576)
        real, imaginary = self.stft(F.pad(x, (0, _CONTEXT), mode="reflect")).split(_BINS, dim=1)
        x = torch.hypot(real, imaginary)  # (frames, 129, 4)
        for conv in self.encoder:
            x = conv(x).relu()
        x, state = self.rnn(x.squeeze(-1), state)  # (frames, 128)
        x = self.decoder(x.relu().unsqueeze(-1))  # (frames, 1, 1)
        return x.sigmoid().flatten(), (context, state)


_reading = threading.Lock()


def voice_activity() -> VoiceActivity:
    """The network on the CPU, read once, whichever thread asks first.

    Raises:
        UserError: the package, or its weights, are not there.
    """
    with _reading:
        return _network()


@functools.cache
def _network() -> VoiceActivity:
    package = importlib.util.find_spec("silero_vad")  # finds it without importing it
    file = Path(package.origin).with_name("data") / "silero_vad.jit" if package and package.origin else None
    if file is None or not file.is_file():
        raise UserError("telling speech from silence needs the weights of silero-vad: pip install 'silero-vad>=6.2.3'")
    with warnings.catch_warnings():
        # Of torch.jit. But the package's .safetensors file holds other weights than this, the model that it runs.
        warnings.simplefilter("ignore")
        tensors = torch.jit.load(file, map_location="cpu").state_dict()
    network = VoiceActivity()
    for_16k = {name: tensor for name, tensor in tensors.items() if name.startswith("_model.")}
    network.load_state_dict({_own_name(name): tensor for name, tensor in for_16k.items()})
    return network.requires_grad_(False)


def _own_name(name: str) -> str:
    """Of a tensor, from the name that the package gives it."""
    name = name.removeprefix("_model.").replace("forward_basis_buffer", "weight").replace("reparam_conv.", "")
    name = name.replace("decoder.decoder.2.", "decoder.")
    return f"{name.removeprefix('decoder.')}_l0" if ".rnn." in name else name
