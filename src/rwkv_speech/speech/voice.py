"""How likely somebody speaks, 31 times a second: the network of silero-vad, from the weights that its package ships.

The package itself is not imported: that would bind the whole process to one thread, and run the network frame by frame
as TorchScript, which current torch deprecates. Here the convolutions run over all frames at once.
"""

import functools
import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from rwkv_speech.errors import UserError

FRAME = 512  # samples at 16 kHz that one probability is told for
_CONTEXT = 64  # samples before a frame that are seen with it
_HOP = 128
_BINS = 129  # of a Fourier transform of 256 samples

Memory = tuple[Tensor, tuple[Tensor, Tensor]]  # the last samples seen, and the state of the LSTM


class VoiceActivity(nn.Module):
    """silero-vad 6 for 16 kHz; made by `voice_activity`. Its layers are named as in the package's weight file."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 2 * _BINS, 256, stride=_HOP, bias=False)
        self.conv1 = nn.Conv1d(_BINS, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm_cell = nn.LSTM(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

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
        real, imaginary = self.stft_conv(F.pad(x, (0, _CONTEXT), mode="reflect")).split(_BINS, dim=1)
        x = torch.hypot(real, imaginary)  # (frames, 129, 4)
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = conv(x).relu()
        x, state = self.lstm_cell(x.squeeze(-1), state)  # (frames, 128)
        x = self.final_conv(x.relu().unsqueeze(-1))  # (frames, 1, 1)
        return x.sigmoid().flatten(), (context, state)


@functools.cache
def voice_activity() -> VoiceActivity:
    """The network on the CPU, read once.

    Raises:
        UserError: the package, or its weights, are not there.
    """
    package = importlib.util.find_spec("silero_vad")  # finds it without importing it
    weights = Path(package.origin).with_name("data") / "silero_vad_16k.safetensors" if package else None
    if weights is None or not weights.is_file():
        raise UserError("long audio needs the weights that come with silero-vad: pip install 'silero-vad>=6.2.3'")
    network = VoiceActivity()
    tensors = load_file(weights)
    network.load_state_dict({f"{n}_l0" if n.startswith("lstm") else n: tensor for n, tensor in tensors.items()})
    return network.requires_grad_(False)
