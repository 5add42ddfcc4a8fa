"""The trained adapter: K encoder frames -> one position of the language model."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Adapter(nn.Module):
    """Stack K consecutive frames channel-major, then Linear, ReLU, Linear.

    `layers.state_dict()` holds the published names: `0.weight` (hidden, K * width), `0.bias`, `2.weight`
    (n_embd, hidden), `2.bias`. The weights stay in their own type (fp32 masters) and compute in that of the frames.

    Args:
        width: channels of one encoder frame.
        n_embd: width of the language model.
        downsample_k: frames per position, K.
        hidden: units between the two matrices.
    """

    def __init__(self, width: int, n_embd: int, *, downsample_k: int = 5, hidden: int = 2048) -> None:
        super().__init__()
        self.downsample_k = downsample_k
        self.layers = nn.Sequential(_First(downsample_k * width, hidden), nn.ReLU(), _Linear(hidden, n_embd))

    def standardise(self, mean: Tensor, std: Tensor) -> None:
        """From now on each channel of the frames has `mean` (width,) taken off and is divided by `std` (width,)."""
        first = self.layers[0]
        first.mean, first.std = (x.to(first.weight.device, torch.float32) for x in (mean, std))

    def published(self) -> dict[str, Tensor]:
        """The weights by their names in `layers`, of an adapter of frames as they are that does the same."""
        # Not named_parameters: those that don't learn may be buffers.
        found = {f"{i}.{name}": getattr(self.layers[i], name) for i in (0, 2) for name in ("weight", "bias")}
        if self.layers[0].mean is not None:
            with torch.no_grad():
                found["0.weight"], found["0.bias"] = self.layers[0].of_frames_as_they_are()
        return found

    def group_count(self, frames: int) -> int:
        """Positions that an utterance of so many valid frames gets: an incomplete last group is dropped, but
        audio too short for one group is padded to one."""
        return max(1, frames // self.downsample_k)

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Args:
            frames: (B, F, width), padded on the right with anything.
            lengths: (B,) int64, valid frames of each.

        Returns:
            (B, G, n_embd) in the type of the frames, G = group_count(F), and (B,) int64, the valid positions of
            each: group_count(length). Positions beyond those hold no meaning.
        """
        K = self.downsample_k
        # Only an utterance shorter than one group can see its padding: it must be zeros there.
        padding = torch.arange(frames.shape[1], device=frames.device) >= lengths[:, None]  # (B, F)
        frames = frames.masked_fill(padding[..., None], 0)
        frames = F.pad(frames, (0, 0, 0, max(0, K - frames.shape[1])))
        stacked = frames.unfold(1, K, K).flatten(2)  # (B, G, width * K), input = channel * K + offset
        return self.layers(stacked), (lengths // K).clamp(min=1)


class _Linear(nn.Linear):
    """A Linear that computes in the type of its input; the gradient arrives in the type of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class _First(_Linear):
    """The matrix that reads stacked frames.

    mean, std: (width,), which the channels of the frames are standardised by; None: they aren't. The matrix that does
        that to frames as they are is what computes: in half precision, too, it is what a mission file will hold.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        for name in ("mean", "std"):
            self.register_buffer(name, None, persistent=False)

    def of_frames_as_they_are(self) -> tuple[Tensor, Tensor]:
        """Weight and bias: W (x - mean) / std + b = (W / std) x + (b - (W / std) mean)."""
        weight = self.weight.unflatten(1, (len(self.mean), -1)) / self.std[:, None]
        return weight.flatten(1), self.bias - weight.sum(2) @ self.mean.to(weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.mean is None:
            return super().forward(x)
        weight, bias = self.of_frames_as_they_are()
        return F.linear(x, weight.to(x.dtype), bias.to(x.dtype))
