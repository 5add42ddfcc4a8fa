"""The RWKV-6 ("x060", Finch) language model, frozen: its time mix and channel mix.

The five token-shift interpolations are one low-rank product, not five.

Formulas: Peng et al. 2024, "Eagle and Finch" (arXiv:2404.05892); tensor names: BlinkDL's released files.
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
from rwkv_speech.lm.linear import Linear, bmm, low_rank
from rwkv_speech.lm.weights import ModelSizes
from rwkv_speech.lm.wkv import wkv6


class TimeMix(nn.Module):
    """Attention's place: a linear recurrence over a matrix state for each head."""

    def __init__(self, sizes: ModelSizes, layer: int) -> None:
        super().__init__()
        C, H, N = sizes.n_embd, sizes.n_head, sizes.head_size
        self.n_head, self.head_size = H, N
        for name in "xwkvrg":
            setattr(self, f"time_maa_{name}", nn.Parameter(torch.empty(1, 1, C)))
        self.time_maa_w1 = nn.Parameter(torch.empty(C, 5 * sizes.dim_mix))
        self.time_maa_w2 = nn.Parameter(torch.empty(5, sizes.dim_mix, C))
        self.time_decay = nn.Parameter(torch.empty(1, 1, C))
        self.time_decay_w1 = nn.Parameter(torch.empty(C, sizes.dim_decay))
        self.time_decay_w2 = nn.Parameter(torch.empty(sizes.dim_decay, C))
        self.time_faaaa = nn.Parameter(torch.empty(H, N))
        self.time_state = nn.Parameter(torch.empty(H, N, N))  # [value, key]
        self.receptance = Linear(C, C)
        self.key = Linear(C, C)
        self.value = Linear(C, C)
        self.gate = Linear(C, C)
        self.output = Linear(C, C)
        self.ln_x = nn.GroupNorm(H, C, eps=GROUP_NORM_EPS)

    def forward(
        self, x: Tensor, v_first: None, before: Tensor, wkv: Tensor, lengths: Tensor | None
    ) -> tuple[Tensor, None, Tensor]:
        """x (B, T, C), the vector before it (B, C), the state -> the layer's output (B, T, C) and the new state."""
        B, T, C = x.shape
        H, N = self.n_head, self.head_size
        change = shift(x, before) - x
        low = torch.tanh(bmm(torch.addcmul(x, change, self.time_maa_x).view(1, B * T, C), self.time_maa_w1[None]))
        low = low.view(B * T, 5, -1).transpose(0, 1)  # (5, BT, D)
        maa = torch.cat([self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g])
        mix = (maa + bmm(low, self.time_maa_w2)).view(5, B, T, C)
        x_w, x_k, x_v, x_r, x_g = torch.addcmul(x, change, mix)
        r, k, v = (m(z).view(B, T, H, N) for m, z in ((self.receptance, x_r), (self.key, x_k), (self.value, x_v)))
        w = self.time_decay + low_rank(x_w, self.time_decay_w1, self.time_decay_w2, torch.tanh)
        w = w.view(B, T, H, N)
        if x.dtype == torch.float16:  # y, a sum over the past that nothing bounds, may leave its range
            r, k, v, w = (z.float() for z in (r, k, v, w))
        y, wkv = wkv6(r, k, v, w, self.time_faaaa, wkv, lengths)
        return self.output(scaled(norm_heads(y, self.ln_x, x.dtype) * F.silu(self.gate(x_g)))), v_first, wkv


class ChannelMix(nn.Module):
    """The feed-forward half of a block, with its own token shift."""

    def __init__(self, sizes: ModelSizes) -> None:
        super().__init__()
        C = sizes.n_embd
        self.time_maa_k = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_r = nn.Parameter(torch.empty(1, 1, C))
        self.key = Linear(C, sizes.dim_ffn)
        self.receptance = Linear(C, C)
        self.value = Linear(sizes.dim_ffn, C)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """x (B, T, C), the vector before it (B, C) -> (B, T, C)."""
        change = shift(x, before) - x
        k = scaled_square_of_relu(self.key(torch.addcmul(x, change, self.time_maa_k)))
        return torch.sigmoid(self.receptance(torch.addcmul(x, change, self.time_maa_r))) * self.value(k)


class RWKV6(LanguageModel):
    """RWKV-6."""

    generation = 6
    time_mix = TimeMix
    channel_mix = ChannelMix
