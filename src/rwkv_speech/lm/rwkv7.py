"""The RWKV-7 ("x070", Goose) language model, frozen: its time mix and channel mix.

The values of the first layer are mixed into those of all others. They belong to the position, not to the state, and
travel through the blocks beside x.

Formulas: Peng et al. 2025, "RWKV-7 Goose" (arXiv:2503.14456); tensor names: BlinkDL's released files.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_speech.lm.language_model import (
    GROUP_NORM_EPS,
    LanguageModel,
    norm_heads,
    scaled,
    scaled_square_of_relu,
    shift,
)
from rwkv_speech.lm.linear import Linear, low_rank
from rwkv_speech.lm.weights import ModelSizes
from rwkv_speech.lm.wkv import wkv7


class TimeMix(nn.Module):
    """Attention's place: a matrix state for each head, corrected by the delta rule at each step."""

    def __init__(self, sizes: ModelSizes, layer: int) -> None:
        super().__init__()
        C, H, N = sizes.n_embd, sizes.n_head, sizes.head_size
        self.n_head, self.head_size = H, N
        for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "k_k", "k_a"):
            setattr(self, name, nn.Parameter(torch.empty(1, 1, C)))
        ranks = {"w": sizes.dim_decay, "a": sizes.dim_rate, "v": sizes.dim_value, "g": sizes.dim_gate}
        if layer == 0:
            del ranks["v"]  # the first layer has no values of an earlier one
        for name, rank in ranks.items():
            if name != "g":
                setattr(self, f"{name}0", nn.Parameter(torch.empty(1, 1, C)))
            setattr(self, f"{name}1", nn.Parameter(torch.empty(C, rank)))
            setattr(self, f"{name}2", nn.Parameter(torch.empty(rank, C)))
        self.r_k = nn.Parameter(torch.empty(H, N))
        self.time_state = nn.Parameter(torch.empty(H, N, N))  # [value, key]
        self.receptance = Linear(C, C)
        self.key = Linear(C, C)
        self.value = Linear(C, C)
        self.output = Linear(C, C)
        self.ln_x = nn.GroupNorm(H, C, eps=GROUP_NORM_EPS)

    def forward(
        self, x: Tensor, v_first: Tensor | None, before: Tensor, wkv: Tensor, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, C), the first layer's values (None in that layer), the vector before x (B, C), the state ->
        the layer's output (B, T, C), the first layer's values, and the new state."""
        B, T, _ = x.shape
        heads = (B, T, self.n_head, self.head_size)
        change = shift(x, before) - x
        x_r, x_w, x_k, x_v, x_a, x_g = (
            torch.addcmul(x, change, mix) for mix in (self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        )
        r, k, v = self.receptance(x_r), self.key(x_k), self.value(x_v)
        w = self.w0 + low_rank(x_w, self.w1, self.w2, torch.tanh)
        if v_first is None:
            v_first = v
        else:
            v = torch.lerp(v, v_first, torch.sigmoid(self.v0 + low_rank(x_v, self.v1, self.v2)))
        rate = torch.sigmoid(self.a0 + low_rank(x_a, self.a1, self.a2))
        gate = low_rank(x_g, self.g1, self.g2, torch.sigmoid)
        removed = F.normalize((k.float() * self.k_k).view(heads), dim=-1).to(x.dtype)  # the direction that is replaced
        k = k * (1 + (rate - 1) * self.k_a)
        r, w, k, v, rate = (z.view(heads) for z in (r, w, k, v, rate))
        y, wkv = wkv7(r, w, k, v, -removed, removed * rate, wkv, lengths)
        now = (r * k * self.r_k).sum(-1, keepdim=True, dtype=torch.float32).to(x.dtype) * v
        return self.output(scaled((norm_heads(y, self.ln_x, x.dtype) + now.view(x.shape)) * gate)), v_first, wkv


class ChannelMix(nn.Module):
    """The feed-forward half of a block, with its own token shift."""

    def __init__(self, sizes: ModelSizes) -> None:
        super().__init__()
        self.x_k = nn.Parameter(torch.empty(1, 1, sizes.n_embd))
        self.key = Linear(sizes.n_embd, sizes.dim_ffn)
        self.value = Linear(sizes.dim_ffn, sizes.n_embd)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """x (B, T, C), the vector before it (B, C) -> (B, T, C)."""
        k = self.key(torch.addcmul(x, shift(x, before) - x, self.x_k))
        return self.value(scaled_square_of_relu(k))


class RWKV7(LanguageModel):
    """RWKV-7."""

    generation = 7
    time_mix = TimeMix
    channel_mix = ChannelMix
