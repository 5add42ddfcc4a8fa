"""The WKV operator of RWKV-6 in plain torch: fp64 loops to compare with, and chunks of matrix products (`chunked.py`).

Within a chunk that starts from the state S, with L_t the sum of the log-decays of the chunk's steps before t,

    y_t  = (r_t e^{L_t}) S^T + sum_{s<t} A[t,s] v_s + A[t,t] v_t
    A[t,s] = sum_j r_t k_s e^{L_t - L_{s+1}}   (s < t),      A[t,t] = sum_j r_t u k_t
    S'   = S e^{L_C} + sum_s v_s (k_s e^{L_C - L_{s+1}})^T

Every exponent is a sum of log-decays over a stretch of steps, so no factor exceeds 1 and nothing overflows, however
strong the decay. The price is the (C, C, N) tensor of the factors; hence short chunks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_speech.lm.chunked import before


class Chunk6:
    """The factors of one chunk; every tensor (B, H, C, N), fp32."""

    STEPS = 16

    def __init__(self, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> None:
        self.r, self.k, self.v, self.u = r, k, v, u[:, None]
        self.log_decay = -torch.exp(w)
        C = r.shape[-2]
        earlier = torch.ones(C, C, dtype=torch.bool, device=r.device).tril(-1)[..., None]  # (t, s, 1): s < t
        # Each stretch of steps is summed by itself: differences of running sums would lose strong decays' digits.
        stretch = (self.log_decay[..., :, None, :] * earlier).cumsum(-3)  # (B, H, C t, C s, N): steps s+1 .. t
        self.between = torch.exp(F.pad(stretch[..., :-1, :, :], (0, 0, 0, 0, 1, 0))) * earlier  # steps s+1 .. t-1
        self.from_start = torch.exp(before(self.log_decay))
        self.to_end = torch.exp(stretch[..., -1, :, :])
        self.whole = torch.exp(self.log_decay.sum(-2, keepdim=True))  # (B, H, 1, N)
        step = torch.arange(C, device=r.device)
        self.passes = ((step < step[:, None, None]) & (step[:, None, None] < step[:, None])).to(r.dtype)  # s < o < t

    def attention(self) -> Tensor:  # (B, H, C t, C s)
        A = torch.einsum("bhtn,bhsn,bhtsn->bhts", self.r, self.k, self.between)
        return A + torch.diag_embed((self.r * self.u * self.k).sum(-1))

    def forward(self, S: Tensor) -> tuple[Tensor, Tensor]:
        y = self.attention() @ self.v + (self.r * self.from_start) @ S.mT
        return y, S * self.whole + self.v.mT @ (self.k * self.to_end)

    def backward(self, S: Tensor, gy: Tensor, G: Tensor) -> tuple[Tensor, ...]:
        """From gy and the gradient G of the state after the chunk: those of r, k, v, w, u, and of S."""
        gA = gy @ self.v.mT
        now = torch.diagonal(gA, dim1=-2, dim2=-1)[..., None]  # (B, H, C, 1)
        gr_inside = torch.einsum("bhts,bhsn,bhtsn->bhtn", gA, self.k, self.between)
        gk_inside = torch.einsum("bhts,bhtn,bhtsn->bhsn", gA, self.r, self.between)
        gr_state = gy @ S * self.from_start
        gk_state = self.v @ G * self.to_end
        # A decay lies on every way that passes its step: from s to t, from the state to t, from s to the end, and from
        # end to end. Each kind is summed by itself, for the reason given above.
        ways = torch.einsum("bhts,bhtn,bhsn,bhtsn->bhtsn", gA, self.r, self.k, self.between)
        g_log_decay = (
            torch.einsum("bhtsn,ots->bhon", ways, self.passes)
            + before((self.r * gr_state).flip(-2)).flip(-2)
            + before(self.k * gk_state)
            + (G * S).sum(-2, keepdim=True) * self.whole
        )
        return (
            gr_inside + gr_state + now * self.u * self.k,
            gk_inside + gk_state + now * self.u * self.r,
            self.attention().mT @ gy + (self.k * self.to_end) @ G.mT,
            g_log_decay * self.log_decay,
            (now * self.r * self.k).sum(-2),
            (gy.mT @ (self.r * self.from_start)) + G * self.whole,
        )


def wkv6_reference(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence as written in the RWKV-6 paper (Peng et al. 2024, arXiv:2404.05892, eq. 18-19).

    Args:
        r, k, v, w: (B, T, H, N); `w` is the log of minus the log of the decay, `d = exp(-exp(w))`.
        u: (H, N), the bonus of the current token.
        state: (H, N, N) shared by the batch, or (B, H, N, N); index [value, key].
        lengths: (B,) valid steps of each sample, or None for all T.

    Returns:
        y (B, T, H, N), zero at and after each sample's length, and the final state (B, H, N, N); both fp64
        and differentiable by autograd in all six inputs.
    """
    r, k, v, w, u, state = (x.double() for x in (r, k, v, w, u, state))
    B, T, H, N = r.shape
    decay = torch.exp(-torch.exp(w))
    per_sample = state.expand(B, H, N, N)
    outputs, finals = [], []
    for b in range(B):
        S = per_sample[b]  # (H, N value, N key)
        steps = T if lengths is None else int(lengths[b])
        ys = []
        for t in range(steps):
            kv = v[b, t, :, :, None] * k[b, t, :, None, :]  # (H, N value, N key)
            ys.append(((S + u[:, None, :] * kv) * r[b, t, :, None, :]).sum(-1))
            S = decay[b, t, :, None, :] * S + kv
        ys.extend(r.new_zeros(H, N) for _ in range(T - steps))
        outputs.append(torch.stack(ys))
        finals.append(S)
    return torch.stack(outputs), torch.stack(finals)
