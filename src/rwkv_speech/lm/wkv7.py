"""The WKV operator of RWKV-7 in plain torch: fp64 loops to compare with, and chunks of matrix products (`chunked.py`).

Within a chunk that starts from the state S, with P_t the product of the chunk's decays up to and with step t,

    R = r P,   A = a P / d,   K = k / P,   B = b / P                                 (rows of a step each)
    U = (I - tril(A B^T, -1))^-1 (tril(A K^T, -1) V + A S^T)                         (row t: S_{t-1} a_t)
    Y = tril(R K^T) V + tril(R B^T) U + R S^T
    S' = (S + V^T K + U^T B) P_C

No decay is below exp(-exp(-1/2)) = 0.545, so that 1 / P stays below 8e16 in a chunk of 64 steps, within fp32's range.
"""

import math

import torch
from torch import Tensor

from rwkv_speech.lm.chunked import before

STRONGEST = math.exp(-0.5)  # minus the logarithm of the strongest decay


class Chunk7:
    """The factors of one chunk; every tensor (B, H, C, N), fp32."""

    STEPS = 64  # a GPU wants few and large products; on a CPU 16 to 64 take the same time

    def __init__(self, r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> None:
        self.sigmoid = torch.sigmoid(w)
        log_decay = -STRONGEST * self.sigmoid
        self.P, self.P_before = torch.exp(log_decay.cumsum(-2)), torch.exp(before(log_decay))
        self.R, self.A = r * self.P, a * self.P_before
        self.KB = torch.cat([k / self.P, b / self.P], -2)  # (B, H, 2C, N)
        self.v, self.C = v, r.shape[-2]
        self.seen = self._lower(self.R @ self.KB.mT, 0)  # (B, H, C, 2C): what y takes of v and of U
        self.fed = self._lower(self.A @ self.KB.mT, -1)  # what U takes of them

    def _lower(self, x: Tensor, diagonal: int) -> Tensor:
        """x (B, H, C, 2C) with both its halves cut to their lower triangles."""
        return torch.cat([half.tril(diagonal) for half in x.split(self.C, -1)], -1)

    def _solve(self, x: Tensor, *, transposed: bool) -> Tensor:
        """(I - F)^-1 x, or its transpose, for the strictly lower triangle F of U in itself."""
        minus = -self.fed[..., self.C :]
        if transposed:
            return torch.linalg.solve_triangular(minus.mT, x, upper=True, unitriangular=True)
        return torch.linalg.solve_triangular(minus, x, upper=False, unitriangular=True)

    def _values(self, S: Tensor) -> Tensor:
        """v and U, (B, H, 2C, N)."""
        U = self._solve(self.fed[..., : self.C] @ self.v + self.A @ S.mT, transposed=False)
        return torch.cat([self.v, U], -2)

    def forward(self, S: Tensor) -> tuple[Tensor, Tensor]:
        values = self._values(S)
        y = self.seen @ values + self.R @ S.mT
        return y, (S + values.mT @ self.KB) * self.P[..., -1:, :]

    def backward(self, S: Tensor, gy: Tensor, G: Tensor) -> tuple[Tensor, ...]:
        """From gy and the gradient G of the state after the chunk: those of r, w, k, v, a, b, and of S."""
        values = self._values(S)
        after = (S + values.mT @ self.KB) * self.P[..., -1:, :]
        G_sum = G * self.P[..., -1:, :]  # gradient of S + V^T K + U^T B
        g_values = self.seen.mT @ gy + self.KB @ G_sum.mT
        gU = self._solve(g_values[..., self.C :, :], transposed=True)  # gradient of the right-hand side of U
        g_seen, g_fed = self._lower(gy @ values.mT, 0), self._lower(gU @ values.mT, -1)
        gR, gA = g_seen @ self.KB + gy @ S, g_fed @ self.KB + gU @ S
        gKB = g_seen.mT @ self.R + g_fed.mT @ self.A + values @ G_sum
        # The logarithm of a decay is part of log P of its own step and all later ones; A has that of the step before.
        gK, gB = gKB.split(self.C, -2)
        scaled = (gKB * self.KB).unflatten(-2, (2, self.C)).sum(-3)
        g_log_P, g_log_P_before = gR * self.R - scaled, gA * self.A
        end = (G * after).sum(-2, keepdim=True)
        g_log_decay = end + _from(g_log_P) + _from(g_log_P_before) - g_log_P_before
        return (
            gR * self.P,
            -STRONGEST * self.sigmoid * (1 - self.sigmoid) * g_log_decay,
            gK / self.P,
            g_values[..., : self.C, :] + self.fed[..., : self.C].mT @ gU,
            gA * self.P_before,
            gB / self.P,
            gy.mT @ self.R + gU.mT @ self.A + G_sum,
        )


def _from(x: Tensor) -> Tensor:
    """Sums over the steps (dimension -2) from each step on."""
    return x.flip(-2).cumsum(-2).flip(-2)


def wkv7_reference(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence as written in the RWKV-7 paper (Peng et al. 2025, arXiv:2503.14456).

    Args:
        r, w, k, v, a, b: (B, T, H, N); the decay is `d = exp(-exp(-0.5) sigmoid(w))`.
        state: (H, N, N) shared by the batch, or (B, H, N, N); index [value, key].
        lengths: (B,) valid steps of each sample, or None for all T.

    Returns:
        y (B, T, H, N), zero at and after each sample's length, and the final state (B, H, N, N); both fp64
        and differentiable by autograd in all seven inputs.
    """
    r, w, k, v, a, b, state = (x.double() for x in (r, w, k, v, a, b, state))
    B, T, H, N = r.shape
    decay = torch.exp(-math.exp(-0.5) * torch.sigmoid(w))
    per_sample = state.expand(B, H, N, N)
    outputs, finals = [], []
    for i in range(B):
        S = per_sample[i]  # (H, N value, N key)
        steps = T if lengths is None else int(lengths[i])
        ys = []
        for t in range(steps):
            removed = (S * a[i, t, :, None, :]).sum(-1)  # (H, N value)
            S = S * decay[i, t, :, None, :] + removed[..., None] * b[i, t, :, None, :]
            S = S + v[i, t, :, :, None] * k[i, t, :, None, :]
            ys.append((S * r[i, t, :, None, :]).sum(-1))
        ys.extend(r.new_zeros(H, N) for _ in range(T - steps))
        outputs.append(torch.stack(ys))
        finals.append(S)
    return torch.stack(outputs), torch.stack(finals)
