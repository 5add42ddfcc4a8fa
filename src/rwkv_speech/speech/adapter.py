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

    mean, std: (width,) of the frames, which the adapter takes off and divides by, channel by channel; None: it takes
        frames as they are. `published` has adapters of the second kind only.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(self, width: int, n_embd: int, *, downsample_k: int = 5, hidden: int = 2048) -> None:
        super().__init__()
        self.downsample_k = downsample_k
        self.layers = nn.Sequential(_Linear(downsample_k * width, hidden), nn.ReLU(), _Linear(hidden, n_embd))
        for name in ("mean", "std"):
            self.register_buffer(name, None, persistent=False)

    def standardise(self, mean: Tensor, std: Tensor) -> None:
        """Sets `mean` and `std`, where no channel's is zero."""
        self.mean, self.std = (x.to(self.layers[0].weight.device, torch.float32) for x in (mean, std))

    def published(self) -> dict[str, Tensor]:
        """The weights by their names in `layers`, of an adapter without `mean` and `std` that does the same."""
        # Not named_parameters: those that don't learn may be buffers.
        found = {f"{i}.{name}": getattr(self.layers[i], name) for i in (0, 2) for name in ("weight", "bias")}
        if self.mean is not None:
            weight = found["0.weight"].detach().unflatten(1, (len(self.mean), self.downsample_k)) / self.std[:, None]
            found["0.weight"] = weight.flatten(1)
            found["0.bias"] = found["0.bias"].detach() - weight.sum(2) @ self.mean.to(weight.dtype)
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
        if self.mean is not None:  # of the padding, too, as what `published` gives has it
            frames = (frames - self.mean.to(frames.dtype)) / self.std.to(frames.dtype)
        stacked = frames.unfold(1, K, K).flatten(2)  # (B, G, width * K), input = channel * K + offset
        return self.layers(stacked), (lengths // K).clamp(min=1)


class _Linear(nn.Linear):
    """A Linear that computes in the type of its input; the gradient arrives in the type of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))
